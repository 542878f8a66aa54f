"""Ranks wait for the next call of rank 0."""

import threading
from unittest import mock

import pytest

from refengine.checkpoint import Checkpoint
from refengine.ranks.comm import RankError
from refengine.ranks.comm.threads import on_each
from refengine.ranks.runner import RankRunner
from refengine.runner import How, LocalRunner, Part
from refengine.spec.layout import Layout
from refengine.spec.ops import numpy_backend
from refengine.spec.ranks import part
from refengine.spec.shard import Shard
from tests.support.runners import over_ranks


def test_ranks_wait_with_a_timeout_exactly_while_a_sequence_has_a_slot():
    """Rank 0 may be idle without limit between texts; during a text, its silence must end the job."""
    checkpoint, waits = Checkpoint.open("tiny"), []

    def rank(comm):
        shard, backend, broadcast = Shard(Layout(2), comm.rank), numpy_backend(), comm.broadcast

        def watched(value=None, idle=False):
            if comm.rank:
                waits.append(idle)
            return broadcast(value, idle)

        comm.broadcast = watched
        model = part(checkpoint.config, checkpoint.read, backend, shard, comm)
        runner = RankRunner(model, checkpoint.config, comm, shard, backend)
        if comm.rank:
            return runner.follow()
        runner.read([Part(0, [5, 6, 7], How(), True), Part(1, [8], How(), True)])
        runner.step([0, 1], [9, 9])
        runner.drop([0])
        runner.step([1], [9])
        runner.drop([1])
        runner.score([5, 6, 7])
        runner.close()

    on_each(2, rank)
    # read, step, step, the end of both, score, close
    assert waits == [True, False, False, False, True, True]


def test_after_an_interrupted_call_nothing_more_is_sent_to_the_other_ranks():
    def work(runner):
        with (
            mock.patch.object(LocalRunner, "read", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            runner.read([Part(0, [5, 6, 7], How(), True)])
        with mock.patch.object(runner.comm, "broadcast") as broadcast:
            with pytest.raises(RankError, match="interrupted: start the job again"):
                runner.score([5, 6, 7])
            runner.drop([0])
            runner.close()
        assert not broadcast.called

    over_ranks(Layout(1), work)


def test_sequences_must_fit_into_the_memory_of_every_rank(monkeypatch):
    free, rank_of = [10**9, 10**9], {}
    monkeypatch.setattr("refengine.runner.available_memory", lambda: free[rank_of[threading.get_ident()]])

    def work(runner):
        rank_of[threading.get_ident()] = runner.comm.rank
        if runner.comm.rank:
            return runner.follow()
        found = []
        for least in ([10**9, 10**9], [10**3, 10**9], [10**9, 10**3]):
            free[:] = least
            found.append(runner.fits([(0, 9), (5, 20)]))
        runner.close()
        return found

    assert over_ranks(Layout(2), work, everywhere=True)[0] == [True, False, False]

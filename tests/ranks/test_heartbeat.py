"""Heartbeats decide which ranks are considered dead, and when."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case
from refengine.ranks.comm import Solo, heartbeat
from refengine.ranks.comm.heartbeat import Heartbeat, ends
from refengine.ranks.load import with_heartbeats
from refengine.spec.layout import plan
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.ranks import sharded
from refengine.spec.shard import Shard

TIMEOUT = 4.0
RANKS = range(4)


class Clock:
    """A clock that a test sets."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = 100.0
        patch.setattr(heartbeat, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def group(count: int = 4) -> list[Heartbeat]:
    return [Heartbeat(rank, TIMEOUT) for rank in range(count)]


def send(ranks: list[Heartbeat], sender: int, waits=()) -> None:
    """Send the heartbeat of a rank, if one is due, to all others."""
    if text := ranks[sender].beat(waits):
        for other in ranks:
            if other.rank != sender:
                other.receive(sender, text)


def test_the_dead_are_the_ends_of_chains_of_waiting():
    assert ends([0, 2], {}) == [0, 2]
    assert ends([0], {0: [1], 2: [0]}) == [1], "0 waits for 1 itself"
    assert ends([0], {0: [1], 1: [3, 2]}) == [2, 3]
    assert ends([0], {0: [1], 1: [0]}) == [0], "all wait for each other"


def test_a_heartbeat_is_due_four_times_within_the_timeout(clock):
    mine, sent = Heartbeat(0, TIMEOUT), 0
    for _ in range(64):
        clock.now += TIMEOUT / 64
        sent += bool(mine.beat())
    assert sent == 4


def test_a_rank_without_heartbeat_is_dead_after_the_timeout_and_not_before(clock):
    mine, since = Heartbeat(0, TIMEOUT), clock.now
    clock.now += TIMEOUT - 0.01
    assert mine.dead([1, 2], since) == []
    mine.receive(2, "1 0")
    clock.now += 0.02
    assert mine.dead([1, 2], since) == [1]
    clock.now += TIMEOUT
    assert mine.dead([1, 2], since) == [1, 2]


def test_the_same_heartbeat_twice_counts_once(clock):
    """A store keeps the last heartbeat of a rank that has ended."""
    mine, since = Heartbeat(0, TIMEOUT), clock.now
    for _ in range(9):
        clock.now += TIMEOUT / 4
        mine.receive(1, "1 0")
    assert mine.dead([1], since) == [1]


def wait(clock, ranks, chain: list[int], works: int | None, seconds: float, since: float) -> list:
    """Return the ranks that one rank of a waiting chain considers dead; `works` is the one that computes."""
    until = clock.now + seconds
    while clock.now < until:
        clock.now += TIMEOUT / 16
        for rank, other in pairwise(chain):
            send(ranks, rank, [other])
            if dead := ranks[rank].dead([other], since):
                return dead
        if works is not None:
            send(ranks, works)
    return []


@given(chain=st.permutations(RANKS))
def test_those_that_wait_for_one_that_waits_for_one_at_work_wait_on(chain):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        ranks = group()
        assert wait(clock, ranks, chain, chain[-1], 9 * TIMEOUT, clock.now) == []
        assert wait(clock, ranks, chain, None, 3 * TIMEOUT, clock.now) == [chain[-1]], "it stops"


@given(ring=st.permutations(RANKS))
def test_ranks_that_all_wait_for_each_other_do_not_wait_for_ever(ring):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        assert wait(clock, group(), [*ring, ring[0]], None, 3 * TIMEOUT, clock.now)


def test_a_heartbeat_precedes_every_layer():
    case, said = Case(layers="M*E-", batch=1), []
    backend = with_heartbeats(numpy_backend(np.float64), SimpleNamespace(at_work=lambda: said.append(1)))
    model = Model.build(case.cfg, case.read, backend)
    model.blocks(model.embed(case.ids), model.new_states(1))
    assert len(said) == len(case.layers) + 1, "and before the final norm"


def test_a_rank_takes_no_step_that_knows_of_no_other_ranks():
    whole = replace(numpy_backend(np.float64), step=print)
    cfg = Case(layers="M*E-").cfg
    assert sharded(whole, cfg, Shard(plan(cfg, 2, 1, 1), 0), Solo()).step is None

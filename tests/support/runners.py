"""Runners over ranks in threads of this process."""

from __future__ import annotations

from collections.abc import Callable

from refengine.checkpoint import Checkpoint
from refengine.ranks.comm.threads import on_each
from refengine.ranks.runner import RankRunner
from refengine.spec.layout import Layout
from refengine.spec.ops import Backend, numpy_backend
from refengine.spec.ranks import part
from refengine.spec.shard import Shard


def over_ranks(
    layout: Layout, work: Callable, everywhere: bool = False, plain: Callable[[], Backend] = numpy_backend
) -> list:
    """Return what work(runner) returns on rank 0 while the others follow, or, everywhere, on each rank.

    The model is the embedded one; ranks are threads.
    """
    checkpoint = Checkpoint.open("tiny")

    def rank(comm):
        shard, backend = Shard(layout, comm.rank), plain()
        model = part(checkpoint.config, checkpoint.read, backend, shard, comm)
        runner = RankRunner(model, checkpoint.config, comm, shard, backend)
        if everywhere:
            return work(runner)
        if comm.rank:
            return runner.follow()
        result = work(runner)
        runner.close()
        return result

    return on_each(layout.ranks, rank)


def case_over_ranks(layout: Layout, case, work: Callable, plain: Backend) -> list:
    """Return what work(runner) returns on rank 0 while the others follow; the model is that of a case."""

    def rank(comm):
        shard = Shard(layout, comm.rank)
        runner = RankRunner(part(case.cfg, case.read, plain, shard, comm), case.cfg, comm, shard, plain)
        if comm.rank:
            return runner.follow()
        result = work(runner)
        runner.close()
        return result

    return on_each(layout.ranks, rank)[0]

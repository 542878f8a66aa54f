"""refengine bench on ranks: contexts are as long as it says, also of sequences that a rank has for itself."""

import numpy as np
import pytest

from refengine.checkpoint import Checkpoint
from refengine.ranks.bench import bench, with_context
from refengine.ranks.comm.threads import on_each
from refengine.ranks.engine import RankEngine
from refengine.spec.layout import Layout
from refengine.spec.ops import numpy_backend
from refengine.spec.ranks import part
from refengine.spec.shard import Shard
from tests.support.layouts import spelled

LAYOUTS = [Layout(2), Layout(1, 2), Layout(1, 1, 2), Layout(2, 2)]


def on_ranks(layout: Layout, work) -> list:
    """work(engine) of every rank, on the embedded model."""

    checkpoint = Checkpoint.open("tiny")

    def rank(comm):
        shard, plain = Shard(layout, comm.rank), numpy_backend()
        model = part(checkpoint.config, checkpoint.read, plain, shard, comm)
        return work(RankEngine(checkpoint, model, 0.0, comm, shard, plain))

    return on_each(layout.ranks, rank)


@pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_context_is_as_long_as_was_asked(layout, batch):
    def lengths(engine):
        states = with_context(engine, batch, 9)
        own = engine.seats.sizes[engine.shard.at[1]]
        return own, [state.length for state in states if hasattr(state, "length")]

    found = on_ranks(layout, lengths)
    assert sum(len(caches) for _, caches in found) == 2 * layout.tp * layout.ep, "two layers of attention"
    for own, caches in found:
        assert all(np.array_equal(length, [9] * own) for length in caches)
    if layout.ep > 1 and batch > 1:
        assert [own for own, _ in found[:: layout.tp]] == [1, 2]


def test_a_row_for_all_that_was_asked_and_the_memory_of_the_rank_that_took_most():
    def rows(engine):
        measured = [
            (row["what"], row["batch"], row["tokens"])
            for row in bench(engine, [3, 20], [2], [4], repeat=1, steps=1)
        ]
        return measured, engine.largest(engine.comm.rank)

    asked = [("prefill", 1, 3), ("prefill", 1, 20), ("decode", 2, 4)]
    assert on_ranks(Layout(1, 2), rows) == [(asked, 1.0)] * 2

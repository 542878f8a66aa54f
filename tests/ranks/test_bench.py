"""`refengine bench` on ranks has contexts of the stated length, also for sequences of a single rank."""

import numpy as np
import pytest

from refengine.bench import bench
from refengine.spec.layout import Layout
from tests.support.layouts import spelled
from tests.support.runners import over_ranks

LAYOUTS = [Layout(2), Layout(1, 2), Layout(1, 1, 2), Layout(2, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_context_is_as_long_as_was_asked(layout, batch):
    def lengths(runner):
        runner.part_of_fill(list(range(batch)), 9)
        own = runner.seats.sizes[runner.shard.at[1]]
        return own, [s.length for _, states in runner.slots.batches for s in states if hasattr(s, "length")]

    found = over_ranks(layout, lengths, everywhere=True)
    assert sum(len(caches) for _, caches in found) == 2 * layout.tp * layout.ep, "two layers of attention"
    for own, caches in found:
        assert all(np.array_equal(length, [9] * own) for length in caches)
    if layout.ep > 1 and batch > 1:
        assert [own for own, _ in found[:: layout.tp]] == [1, 2]


def test_a_row_for_all_that_was_asked_and_the_memory_of_the_rank_that_took_most():
    def rows(runner):
        measured = [
            (row["what"], row.get("batch"), row.get("tokens"))
            for row in bench(runner, "float32", 1, [3, 20], [2], [4], repeat=1, steps=1, host=False)
        ]
        return measured

    asked = [("machine", None, None), ("prefill", 1, 3), ("prefill", 1, 20), ("decode", 2, 4)]
    assert over_ranks(Layout(1, 2), rows)[0] == asked


def test_the_largest_number_of_all_ranks():
    assert over_ranks(Layout(1, 2), lambda r: r.largest(r.comm.rank), everywhere=True) == [1, 1]

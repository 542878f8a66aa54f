"""Verified tokens, of which a part is kept, and forks give the same results over ranks as in one process."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.spec.layout import Layout
from tests.support.benches import BENCHES
from tests.support.layouts import cuttable, spelled
from tests.support.runners import case_over_ranks
from tests.support.sequences import Sequences

pytestmark = pytest.mark.slow

LAYOUTS = [Layout(2), Layout(1, 3), Layout(1, 1, 2), Layout(2, 2), Layout(1, 2, 2)]


def drawn(layout: Layout):
    """Return a strategy of (case that the layout can cut, most tokens verified, whether some are kept)."""
    return st.tuples(cuttable(layout), st.integers(1, 4), st.lists(st.booleans(), min_size=1, max_size=3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
@settings(max_examples=max(4, settings().max_examples // 4))
@given(data=st.data())
def test_what_is_kept_of_verified_tokens_is_so_many_steps_over_ranks(layout, data):
    case, most, keeps = data.draw(drawn(layout))
    backend = BENCHES["numpy-float64"]()

    def work(runner):
        sequences = Sequences(backend, case, runner)
        sequences.turns(most, keeps)
        sequences.fork(1, [5, 6])
        sequences.turn([6, 0, 1, 5], most, True)
        sequences.leave(1)
        sequences.fork(0, [1])
        sequences.verify([2, 0, 1, 5], [sequences.tokens(1) for _ in range(4)])

    case_over_ranks(layout, case, work, backend)

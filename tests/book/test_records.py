"""A recorded call reads several positions, and any number of them can be committed without a copy of S."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.checks import laws, models
from refengine.conformance.checks.laws import Recorded
from refengine.conformance.strategies import cases
from tests.support.checks import test_of

test_a_recorded_call_kept_up_to_any_position_is_so_many_steps = test_of(
    laws.a_recorded_call_kept_up_to_any_position_is_so_many_steps
)
test_a_record_that_is_not_kept_changes_nothing = test_of(laws.a_record_that_is_not_kept_changes_nothing)
test_calls_recorded_and_kept_one_after_another_read_the_sequence = test_of(
    laws.calls_recorded_and_kept_one_after_another_read_the_sequence
)
test_the_prediction_head_keeps_a_part_of_a_recorded_call_too = test_of(
    models.the_prediction_head_keeps_a_part_of_a_recorded_call_too
)


@given(case=cases("M*", max_length=9), k=st.integers(2, 4))
def test_keeping_a_part_of_a_record_copies_no_cache(backend, case, k):
    """A recorded call and its commit write into free room in place, as single steps do."""
    call = Recorded(backend, case, 1, k)
    states = call.model.commit(call.states, call.records, call.counts(k))
    for _ in range(3):
        _, records = call.feed(states, call.before, np.full(case.batch, k), record=True)
        _, _ = call.feed(states, call.before, np.full(case.batch, k), record=True)
        after = call.model.commit(states, records, call.rng.integers(1, k + 1, case.batch))
        assert not states[1].k.shape[1] or place(after[1].k) == place(states[1].k)
        states = after


def place(array):
    """Return the address of an array of any backend, or those of all pages of a cache."""
    if hasattr(array, "cache"):
        return [page.data.ctypes.data for row in array.cache.pages for page in row]
    for name in ("pointer", "data_ptr", "ctypes"):
        if hasattr(array, name):
            found = getattr(array, name)
            return found.data if name == "ctypes" else found() if callable(found) else found
    raise TypeError(type(array))

"""Texts with drafts over ranks are those of one process, greedy and sampled."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.conformance.truth import model
from refengine.runner import LocalRunner
from refengine.spec.layout import Layout
from refengine.spec.ops import numpy_backend
from tests.engine.test_loop import played
from tests.engine.test_speculation import PLANS, alone, oracle_of
from tests.support.layouts import cuttable, spelled
from tests.support.runners import case_over_ranks

EXACT = numpy_backend(np.float64)
LAYOUTS = [
    Layout(2),
    pytest.param(Layout(1, 2), marks=pytest.mark.slow),
    pytest.param(Layout(1, 1, 2), marks=pytest.mark.slow),
    *[
        pytest.param(layout, marks=pytest.mark.thorough)
        for layout in (Layout(1, 3), Layout(2, 2), Layout(1, 2, 2))
    ],
]


def ids_of(events: list) -> list[int]:
    return [getattr(event, "id", -1) for event in events]


@pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
@settings(max_examples=max(4, settings().max_examples // 3))
@given(
    data=st.data(),
    plans=PLANS,
    temperature=st.sampled_from((0.0, 0.8)),
    slots=st.integers(1, 4),
    rate=st.sampled_from((0.0, 0.7)),
)
def test_ranks_write_with_drafts_the_texts_of_one_process(layout, data, plans, temperature, slots, rate):
    """With `auto` the drafts depend on times, so its sampled texts are not compared."""
    case = data.draw(cuttable(layout))
    case = replace(case, mtp_layers="*E")
    plans = [replace(plan, temperature=temperature, leaves=99) for plan in plans]
    if temperature:
        plans = [replace(plan, speculate=2 if plan.speculate == "auto" else plan.speculate) for plan in plans]
        expected = played(LocalRunner(model(case, EXACT)), case, plans, slots, 5)
        together = case_over_ranks(layout, case, lambda runner: played(runner, case, plans, slots, 5), EXACT)
    else:
        expected = alone(case, EXACT, plans)
        with oracle_of(case, plans, expected, rate):
            together = case_over_ranks(
                layout, case, lambda runner: played(runner, case, plans, slots, 5), EXACT
            )
    for events, right in zip(together, expected, strict=True):
        assert ids_of(events) == ids_of(right)

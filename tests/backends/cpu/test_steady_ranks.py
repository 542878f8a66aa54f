"""In the steady mode, over ranks too, draws have the same bits whatever other sequences run."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.backends.cpu import cpu_backend, native
from refengine.runner import How, Part
from refengine.spec.layout import Layout
from refengine.spec.sample import Sampling
from tests.support.layouts import cuttable, spelled
from tests.support.runners import case_over_ranks

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
LAYOUTS = [Layout(2), Layout(4), Layout(1, 2), Layout(2, 2), Layout(1, 1, 2), Layout(1, 3)]
STEPS = 2


def drawn(runner, prompts: dict[int, list[int]], following: dict[int, list[int]]) -> dict[int, list]:
    """Return, by slot, the draws after the prompt and after each step, with all log-probabilities."""
    how, slots = How(Sampling(temperature=0), 0, runner.config.vocab_size), list(prompts)
    calls = [runner.read([Part(slot, ids, how, True) for slot, ids in prompts.items()])]
    for step in range(STEPS):
        calls.append(runner.step(slots, [following[slot][step] for slot in slots]))
    runner.drop(slots)
    return {slot: list(draws) for slot, *draws in zip(slots, *calls, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
@settings(max_examples=5)
@given(data=st.data())
def test_no_draw_moves_with_company(layout, data):
    case = data.draw(cuttable(layout))
    case.read("backbone.norm_f.weight")  # so that one thread makes the checkpoint
    prompts = {row: case.ids[row, : max(1, n)].tolist() for row, n in enumerate(case.lengths)}
    following = {row: case.rng(5, row).integers(0, case.cfg.vocab_size, STEPS).tolist() for row in prompts}

    def work(runner):
        together = drawn(runner, prompts, following)
        for slot, ids in prompts.items():
            assert drawn(runner, {slot: ids}, following)[slot] == together[slot]

    case_over_ranks(layout, case, work, cpu_backend("float32", 1, steady=True))

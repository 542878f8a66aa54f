"""A compiled step rounds to the nearest bfloat16, and obeys every constant of the configuration."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, agree, cases, cut, terms
from refengine.conformance.truth import counted
from refengine.spec.model import Model
from refengine.spec.numerics import tolerance
from refengine.spec.ops import numpy_backend
from tests.book.test_constants import Literal, odd
from tests.support.torch_benches import torch

from refengine.backends.cpu import native  # isort: skip
from refengine.backends.pytorch import torch_backend  # isort: skip

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")


@given(case=cases("*", max_length=1, batch=3), steps=st.integers(1, 5))
def test_what_a_step_appends_to_a_bfloat16_cache_is_the_nearest_to_what_it_computed(case, steps):
    """The error of each key and value is at most half a unit in the last place, and zero on average."""
    m = Model.build(case.cfg, case.read, torch_backend("bfloat16", compute="bfloat16"))
    true = Model.build(case.cfg, case.read, numpy_backend(np.float64))
    ids, mine, theirs = case.rng(19).integers(0, 61, (steps, case.batch)), m.new_states(3), true.new_states(3)
    for t in range(steps):
        _, mine = m.backend.step(m, ids[t], mine)
        _, theirs = true.blocks(true.embed(ids[t][:, None]), theirs)
    assert mine[0].k.dtype == torch.bfloat16
    for stored, exact in ((mine[0].k, theirs[0].k), (mine[0].v, theirs[0].v)):
        stored = stored[:, :, :steps].transpose(1, 2).float().numpy().astype(np.float64)
        exact = exact[:, :steps]
        spacing = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
        error = (np.abs(stored) - np.abs(exact)) / spacing
        assert np.abs(error).max() <= 0.5 + 0.01, "further than the nearest"
        assert abs(error.mean()) < 4 * 0.29 / error.size**0.5, "rounded down, or up, on average"


@given(drawn=odd(), middle=st.integers(1, 8))
def test_a_step_obeys_every_constant(drawn, middle):
    """Read `middle` tokens, then step through the rest, and compare with a literal reading of the model."""
    case, chosen = drawn
    case = replace(case, n_group=1, length=max(2, case.length))
    cfg = replace(case.cfg, **chosen | {"topk_group": 1})
    m = Model.build(cfg, case.read, torch_backend("bfloat16", compute="float32"))
    assert m.backend.step.program(m), "the loops serve it"
    middle = min(middle, case.length - 1)
    read, *_ = cut(case, [middle])
    _, states = m.blocks(m.embed(m.backend.array(case.ids[:, read])), m.new_states(case.batch))
    told = []
    for t in range(middle, case.length):
        logits, states = m.backend.step(m, case.ids[:, t], states)
        told.append(logits)
    size = terms(cfg, case.length)
    for row in range(case.batch):
        literal = Literal(cfg, case.read)
        expected, _ = literal.logits(case.ids[row])
        if not counted(literal.margin <= tolerance(np.float32, size)):
            mine = np.array(told)[:, row]
            agree(mine, expected[middle:], np.float32, size, f"row {row}", literal.stretch)


def test_the_case_of_a_limit_is_one_of_those_that_are_drawn():
    """A lower limit of dt, which no release has, changes a step."""
    case = Case(layers="M", batch=1, length=3)
    low = replace(case.cfg, time_step_limit=(0.3, np.inf))
    one, other = (Literal(cfg, case.read).logits(case.ids[0])[0] for cfg in (case.cfg, low))
    assert np.abs(one - other).max() > 0.01

"""Small random models on the CUDA kernels give the same bits in any order of threads.

Sanitizers report nothing, and a decoding step as a captured graph agrees with the plain step.
"""

import weakref
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.backends.cuda import cuda_backend
from refengine.backends.cuda.steps import Step, Steps
from refengine.conformance.cases import Case, terms
from refengine.spec import state as spec_state
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from tests.support.cuda_device import device, emulated, needs_compiler, on_address, sanitized  # noqa: F401
from tests.support.tries import thorough
from tools.cuda.emulator import EmulatedDevice

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}


@lru_cache
def models(case: Case, device, dtype="float32"):  # noqa: F811
    """Return a random model on the device, and the same in float64."""
    return (
        Model.build(case.cfg, case.read, cuda_backend(dtype, device)),
        Model.build(case.cfg, case.read, numpy_backend(np.float64)),
    )


def near(case: Case, actual, expected, dtype="float32"):
    allowed = 4 * EPS[dtype] * terms(case.cfg, 80) ** 0.5 * max(1, np.abs(expected).max())
    assert np.abs(actual - expected).max() <= allowed


def decoded(model: Model, ids, states):
    """Return the logits of one more token of each row, and the states, by plain calls."""
    here = model.backend
    h, states = model.blocks(model.embed(here.array(ids[:, None])), states)
    return here.fetch(model.head(h))[:, 0], states


SMALL = Case(layers="M*E-", batch=2, length=5)


def told(device, dtype: str = "float32"):  # noqa: F811
    """Return all logits of a small model: of rows of two lengths, then of a step."""
    model, _ = models(SMALL, device, dtype)
    here, n = model.backend, np.array([5, 3])
    h, states = model.blocks(model.embed(here.array(SMALL.ids)), model.new_states(2), here.array(n))
    last, _ = decoded(model, SMALL.ids[:, 0], states)
    return [*(row[:k] for row, k in zip(here.fetch(model.head(h)), n, strict=True)), last]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", *thorough("bfloat16")])
def test_the_order_of_threads_changes_no_bit(dtype):
    one, other = (told(EmulatedDevice(seed), dtype) for seed in (1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.thorough
@on_address
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_sanitizer_finds_anything_in_the_whole_model(sanitized, dtype):  # noqa: F811
    for ours, plain in zip(told(sanitized, dtype), told(emulated(), dtype), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4 if dtype == "float32" else 0.05)


STEPS = Case(layers="M*E-", batch=3, length=70, num_experts_per_tok=9)


def test_a_captured_step_is_the_step(device):  # noqa: F811
    """With the same batch, after a row has left, and after the cache has been enlarged."""
    (model, exact), ids = models(STEPS, device), STEPS.ids
    step = model.backend.step
    states, true = model.new_states(3), exact.new_states(3)
    for t in range(67):  # a cache begins with room for 64
        if t == 4:
            states, true, ids = spec_state.take(states, [2, 0]), spec_state.take(true, [2, 0]), ids[[2, 0]]
        logits, states = step(model, ids[:, t], states)
        expected, true = decoded(exact, ids[:, t], true)
        near(STEPS, logits, expected)
    assert len(step.captured) == 3  # of three rows, of two, and of two with more room


def test_steps_by_turns_are_told_apart_by_where_their_states_lie(device):  # noqa: F811
    """Two forks share the cache of graphs; their states continue by plain calls too."""
    (model, exact), ids = models(STEPS, device), STEPS.ids
    step, futures = model.backend.step, []
    for row in (0, 1):
        states, true = model.new_states(1), exact.new_states(1)
        futures.append([row, states, true])
    for t in range(5):
        for future in futures:
            row, states, true = future
            now = ids[row : row + 1, t]
            logits, states = (step if t != 3 else decoded)(model, now, states)
            expected, true = decoded(exact, now, true)
            near(STEPS, logits, expected)
            future[1:] = states, true


def test_only_a_few_graphs_are_kept(device):  # noqa: F811
    model, _ = models(STEPS, device)
    step = model.backend.step
    for row in range(6):
        states = model.new_states(1)
        for t in range(3):
            _, states = step(model, STEPS.ids[row % 3 : row % 3 + 1, t], states)
    assert len(step.captured) <= 4


def test_steps_that_are_closed_hold_no_model():
    steps, model = Steps(None), Model(SMALL.cfg, {}, numpy_backend())
    steps.warm[0, 1], steps.captured[0, 1] = model, Step(None, model, None, None)
    held = weakref.ref(model)
    steps.close()
    del model
    assert held() is None


@settings(max_examples=4)
@given(seed=st.integers(0, 99), cut=st.integers(1, 8), dtype=st.sampled_from(("float32", "bfloat16")))
def test_reading_then_stepping_is_reading_all(device, seed, cut, dtype):  # noqa: F811
    """Layers of any kinds; every token visits every expert, so that no choice can flip."""
    case = Case(layers="EM*M-", seed=seed, length=9, num_experts_per_tok=9)
    model, exact = models(case, device, dtype)
    here = model.backend
    _, states = model.blocks(model.embed(here.array(case.ids[:, :cut])), model.new_states(2))
    for t in range(cut, 9):
        logits, states = here.step(model, case.ids[:, t], states)
    h, _ = exact.blocks(exact.embed(case.ids), exact.new_states(2))
    if cut < 9:
        near(case, logits, exact.head(h)[:, -1], dtype)


def test_a_state_in_float16_forgets_little(device):  # noqa: F811
    """It is rounded at random over 40 steps of one sequence; the step is captured after the first."""
    case = Case(layers="MM", batch=1, length=40, seed=3)
    model = Model.build(case.cfg, case.read, cuda_backend("float32", device, state="float16"))
    exact, states = models(case, device)[1], model.new_states(1)
    assert states[0].S.dtype == "float16"
    for t in range(40):
        logits, states = model.backend.step(model, case.ids[:, t], states)
    expected = exact.head(exact.blocks(exact.embed(case.ids), exact.new_states(1))[0])[:, -1]
    error = np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2))
    assert 0 < error <= 2.0**-7

"""The CUDA kernels compute the whole model, on the emulator (and on a GPU under -m gpu)."""

from functools import lru_cache

import numpy as np
import pytest

import refengine
from refengine.backends.cuda import CudaBackend, cuda_backend
from refengine.engine import Engine
from refengine.runner import LocalRunner
from refengine.spec.config import InputError
from refengine.spec.model import Model
from refengine.spec.tensors import parameters, table
from tests.support.cuda_device import device, needs_compiler, on_perturbed, perturbed  # noqa: F401
from tools.cuda.emulator import EmulatedDevice

PROMPTS = ["Once upon a time, there was a", "One day"]


@lru_cache
def reference() -> Engine:
    return refengine.load("tiny")


def engine(device, dtype: str) -> Engine:  # noqa: F811
    checkpoint = reference().checkpoint
    model = Model.build(checkpoint.config, checkpoint.read, cuda_backend(dtype, device))
    return Engine(checkpoint, LocalRunner(model), 0.0)


def greedy(engine, count: int):
    """Return the ids of the greedy continuation of each prompt."""
    ids = [[] for _ in PROMPTS]
    for i, event in engine.generate_batch(PROMPTS, temperature=0, max_tokens=count, ignore_eos=True):
        if hasattr(event, "id"):
            ids[i].append(event.id)
    return ids


@pytest.mark.slow
def test_the_embedded_model_tells_the_same_story(device):  # noqa: F811
    """Two prompts of different lengths in one batch, read and continued, agree token for token."""
    expected = greedy(reference(), 6)
    assert greedy(engine(device, "float32"), 6) == expected
    assert len(set(map(tuple, expected))) == 2


@pytest.mark.slow
def test_in_bfloat16_it_says_nearly_the_same(device):  # noqa: F811
    """Logits of a prompt agree with the definition within the rounding of 8-bit significands."""
    ids = reference().ids("Once upon a time, there was a little")
    expected, actual = reference().logits(ids), engine(device, "bfloat16").logits(ids)
    assert actual.dtype == np.float32
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert error <= 4 * 2.0**-7


@pytest.mark.slow
@on_perturbed
def test_approximate_mathematics_changes_no_word(perturbed):  # noqa: F811
    ids = reference().ids("Once upon a time")
    expected, actual = reference().logits(ids), engine(perturbed, "float32").logits(ids)
    assert (actual.argmax(-1) == expected.argmax(-1)).all()
    assert np.abs(actual - expected).max() <= 1e-3


@needs_compiler
@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(dtype="float64"), "computes in float32 or bfloat16, not in float64"),
        (dict(state="bfloat16"), "keeps states in float32 or float16, not in bfloat16"),
    ],
)
def test_a_wrong_choice_is_one_sentence(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        cuda_backend(**dict(device=EmulatedDevice()) | wrong)


@needs_compiler
def test_a_device_that_is_too_small_says_what_fits():
    cfg = reference().config
    weights = parameters(table(cfg))
    for room, dtype, sentence in [
        (4 * weights, "float32", "emulated has .* free: .* parameters fits; in bfloat16 this one does"),
        (weights, "bfloat16", "weights in bfloat16, .* parameters fits$"),
    ]:
        with pytest.raises(InputError, match=sentence):
            cuda_backend(dtype, EmulatedDevice(memory=room), cfg)
    assert isinstance(cuda_backend("bfloat16", EmulatedDevice(memory=3 * weights), cfg), CudaBackend)

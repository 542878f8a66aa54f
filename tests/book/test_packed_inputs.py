"""Inputs of packed weights are packed as in W4A4, W4A8 and W8A8 if a weight has a scale for them."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refengine
from refengine.conformance.cases import agree
from refengine.quantize import quantize, recipe_of
from refengine.spec import moe
from refengine.spec.config import InputError
from refengine.spec.ops import DEFINITION, REFERENCE, numpy_backend
from refengine.spec.quant import TOP_W4A8, fp8, mxfp8, nvfp4, rounded_inputs, with_packed_inputs
from tests.support.packed import packed_checkpoint

F32 = np.float32
FORMATS = {"W4A4": nvfp4, "W4A8": lambda w: nvfp4(w, block=32, top=TOP_W4A8), "W8A8": fp8}
each = pytest.mark.parametrize("form", FORMATS)
SEED = st.integers(0, 9999)
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def weight(form, seed, rows, columns, scale=0.002):
    w = np.random.default_rng([seed, rows]).standard_normal((rows, columns)) * columns**-0.5
    return replace(FORMATS[form](w.astype(ml_dtypes.bfloat16)), input_scale=F32(scale))


def e4m3(value):
    return F32(np.array(value, F32).astype(ml_dtypes.float8_e4m3fn))


def e2m1(value):
    """Return the nearest value; of two equally near values, the one with the even code."""
    distances = [(abs(abs(float(value)) - each), code % 2, code) for code, each in enumerate(E2M1)]
    return np.copysign(F32(E2M1[min(distances)[2]]), value)


def literally(form, x, scale):
    """Return a vector after packing, computed number by number in Python."""
    out = np.empty_like(x)
    if form != "W4A4":
        for i, value in enumerate(x):
            out[i] = e4m3(min(max(value / scale, F32(-448)), F32(448))) * scale
        return out
    for at in range(0, len(x), 16):
        block = x[at : at + 16]
        wanted = max(abs(value) for value in block) / (F32(6) * scale)
        of_block = e4m3(min(max(wanted if wanted else F32(1), F32(2.0**-9)), F32(448))) * scale
        out[at : at + 16] = [e2m1(value / of_block) * of_block for value in block]
    return out


@each
@given(seed=SEED, size=st.sampled_from((1e-6, 0.01, 1.0, 300.0)))
def test_inputs_are_packed_as_the_formula_has_it(form, seed, size):
    x = (np.random.default_rng(seed).standard_normal((2, 64)) * size).astype(F32)
    x[0, 16:32] = 0
    w = weight(form, seed, 5, 64)
    found = rounded_inputs(x, w)
    wanted = np.stack([literally(form, row, w.input_scale) for row in x])
    assert np.array_equal(found, wanted)


@each
@given(seed=SEED)
def test_every_verb_multiplies_packed_inputs(form, seed):
    rng, ops = np.random.default_rng(seed), with_packed_inputs(REFERENCE)
    x = rng.standard_normal((2, 3, 64)).astype(F32)
    w, other, down = weight(form, seed, 40, 64), weight(form, seed, 24, 64, 0.01), weight(form, seed, 64, 96)
    up = weight(form, seed + 1, 96, 64)

    def product(x, w):
        return DEFINITION.linear(rounded_inputs(x, w), w.dequantize())

    both = np.concatenate([product(x, w), product(x, other)], axis=-1)
    agree(ops.linear(x, (w, other)), both, F32, terms=64)
    agree(ops.logits(x, w), product(x, w), F32, terms=64)
    agree(ops.linear_pair(x[..., :32], x[..., 32:], w), product(x, w), F32, terms=64)
    hidden = np.maximum(product(x, up), 0) ** 2
    agree(ops.mlp(x, up, down), product(hidden, down), F32, terms=64, stretch=100)  # codes may differ by one


@each
@given(seed=SEED, first=st.sampled_from((0, 2)))
def test_each_chosen_expert_packs_its_inputs(form, seed, first):
    """One token at a time; the intermediate sums are exact, so that codes do not depend on their order."""
    rng, ops = np.random.default_rng(seed), with_packed_inputs(REFERENCE)
    u = rng.integers(-2, 3, (2, 3, 32)).astype(F32)
    ones = [replace(FORMATS[form]((rng.integers(-1, 2, shape) * 6).astype(F32)), input_scale=F32(scale))
            for _ in range(5) for shape, scale in (((96, 32), 2.0**-6), ((32, 96), 2.0))]  # fmt: skip
    pairs = list(zip(ones[::2], ones[1::2], strict=True))
    expert = np.argsort(rng.random((2, 3, 5)))[..., :2]
    routing = moe.Routing(expert, rng.integers(1, 4, (2, 3, 2)).astype(F32))
    wanted = np.zeros_like(u)
    for at in np.ndindex(expert.shape):
        if (i := int(expert[at]) - first) >= 0:
            up, down = pairs[first:][i]
            inner = np.maximum(rounded_inputs(u[at[:-1]], up) @ up.dequantize().T, 0) ** 2
            wanted[at[:-1]] += routing.weight[at] * (rounded_inputs(inner, down) @ down.dequantize().T)
    found = ops.experts(u, pairs[first:], routing, first)
    agree(found, wanted, F32, terms=32 * 96)


def test_weights_without_a_scale_of_inputs_and_plain_ones_take_inputs_as_they_are():
    x, ops = np.random.default_rng(0).standard_normal((3, 64)).astype(F32), with_packed_inputs(REFERENCE)
    plain = np.random.default_rng(1).standard_normal((8, 64)).astype(F32)
    for w in (plain, nvfp4(plain), fp8(plain), mxfp8(plain)):
        assert np.array_equal(ops.linear(x, w), REFERENCE.linear(x, w))


@pytest.mark.parametrize("form", ["W4A4", "W4A8"])
def test_a_slice_of_a_weight_packs_its_inputs_as_the_whole_does(form):
    """Also if a cut between two ranks makes the blocks of the weight smaller."""
    x = np.random.default_rng(0).standard_normal((2, 96)).astype(F32)
    w = weight(form, 0, 8, 96)
    whole = rounded_inputs(x, w)
    for columns in (slice(0, 48), slice(48, 96), slice(16, 32)):
        part = w[:, columns]
        assert np.array_equal(rounded_inputs(x[:, columns], part), whole[:, columns])
        joined = part[:, :8].joined([part[:, 8:]], 1)
        assert np.array_equal(rounded_inputs(x[:, columns], joined), whole[:, columns])
    if form == "W4A4":
        with pytest.raises(InputError, match="24 inputs are not whole blocks of 16"):
            rounded_inputs(x[:, :24], w[:, :24])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Return a copy of the embedded model, partly in NVFP4 and partly in FP8, with scales of inputs."""
    out = tmp_path_factory.mktemp("copy") / "out"
    quantize("tiny", out, recipe_of("super"), texts=["Once upon a time, there was a small fox."])
    return out


def test_a_model_reads_with_packed_inputs(calibrated):
    with (
        refengine.load(calibrated) as engine,
        refengine.load(calibrated, "auto", packed_inputs=True) as packed,
    ):
        assert packed.model.backend.name == "numpy"
        ids = engine.ids("Once upon a time, there was a little girl.")
        p, q = (each.logits(ids).astype(np.float64) for each in (engine, packed))
    p, q = (a - np.log(np.exp(a).sum(axis=-1, keepdims=True)) for a in (p, q))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    assert 1e-4 < kl < 0.02


def test_what_cannot_be_done_is_one_sentence(calibrated, tmp_path):
    path = packed_checkpoint(tmp_path / "packed")
    with pytest.raises(InputError, match="no weight has an input_scale"):
        refengine.load(path, packed_inputs=True)
    for name in ("cpu", "torch", "cuda"):
        with pytest.raises(
            InputError, match=f"the {name} backend does not pack inputs; --backend numpy does"
        ):
            refengine.load(calibrated, backend=name, packed_inputs=True)
    with pytest.raises(InputError, match="packed_inputs needs the name of a backend"):
        refengine.load(calibrated, backend=numpy_backend(), packed_inputs=True)

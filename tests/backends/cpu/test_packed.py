"""Packed weights of every kind give the results of their matrices, in verbs and in whole models."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from refengine.backends.cpu import cpu_backend, native
from refengine.backends.cpu.experts import Listed
from refengine.backends.cpu.verbs import Verbs
from refengine.backends.cpu.weights import matrix
from refengine.checkpoint import Checkpoint
from refengine.checkpoint import packed as checkpoint_packed
from refengine.conformance.cases import Case
from refengine.spec import blocks
from refengine.spec.model import Model
from refengine.spec.moe import Routing
from refengine.spec.ops import numpy_backend
from refengine.spec.quant import Packed
from refengine.spec.tensors import table
from tests.support.packed import CFG, FORMATS, all_in, mixed, packed_checkpoint, weights

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
HALVES = {  # where a block has float16 numbers
    "q8_0": (0,), "q4_0": (0,), "q5_0": (0,), "q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2),
    "q6_k": (208,), "iq4_nl": (0,), "mxfp4": (), "nvfp4": (), "q2_k": (80, 82),
}  # fmt: skip
UNITS = {"q8_0": 64, "q6_k": 2000, "q4_k": 300, "q5_k": 600, "q2_k": 30, "iq4_nl": 64}  # of large codes
KINDS = [*FORMATS, *HALVES]
SHORT = 1.54e-5  # the rounding of x to 16 bits, of the largest number of a block: 2^-16
ROWS = [1, 2, 3, 4, 5, 9, 12, 13, 33, 48, 65, 130]
STEP = {kind: 16 if kind == "NVFP4" else 32 for kind in KINDS} | {
    kind: each.columns for kind, each in blocks.FORMATS.items()
}  # columns of a block


def verbs(threads: int = 2, steady: bool = False, planes: int = 3) -> Verbs:
    return Verbs(native.load(), threads, steady, planes)


def packed(kind: str, rng, outs: int, n: int):
    """Return random weights of about 1 / sqrt(n), placed on the backend, and the same weights in float64."""
    if kind in FORMATS:
        made = FORMATS[kind]((rng.standard_normal((outs, n)) / np.sqrt(n)).astype(ml_dtypes.bfloat16))
    else:
        form = blocks.FORMATS[kind]
        data = rng.integers(0, 256, (outs * n // form.columns, form.nbytes), np.uint8)
        for at in HALVES[kind]:
            halves = (rng.uniform(-1, 1, len(data)) / np.sqrt(n) / UNITS.get(kind, 8)).astype(np.float16)
            data[:, at : at + 2] = halves[:, None].view(np.uint8)
        if kind == "mxfp4":
            data[:, 0] = rng.integers(118, 123, len(data))
        if kind == "nvfp4":  # the scales; among them the largest, 0, subnormal ones and the code of a NaN
            data[:, :4] = rng.choice([0, 1, 7, 40, 45, 48, 50, 0x7F, 0xC0], (len(data), 4))
        scale = {"q4_0": np.float32(0.7), "nvfp4": np.float32(1 / np.sqrt(n))}.get(kind)
        made = blocks.Blocks(form, data.reshape(outs, -1), scale)
    return matrix(made, "float32"), made.dequantize().astype(np.float64)


def near(found, x, w, rounding: float = 6e-8):
    """Check that `found` is x w' up to the rounding of a float32 sum and of x to 24 bits, or to 16."""
    bound = 4e-7 * np.abs(x).astype(np.float64) @ np.abs(w).T
    bound += rounding * np.abs(x).max(axis=1, keepdims=True) * np.abs(w).sum(axis=1)
    assert np.all(np.abs(found - x.astype(np.float64) @ w.T) <= bound + 1e-30)


def drawn(rng, *shape):
    """Return activations, a few of them large."""
    x = rng.standard_normal(shape).astype(np.float32)
    return np.where(rng.random(shape) < 0.01, 60 * x, x).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outs, some", [(1, 1), (5, 3), (97, 7), (30, 43)])
def test_products_of_few_and_many_rows(kind, outs, some):
    rng = np.random.default_rng([outs, some])
    weight, exact = packed(kind, rng, outs, some * STEP[kind])
    assert isinstance(weight, np.ndarray) == (kind == "q2_k")  # of which there is no loop
    for rows in ROWS if some < 40 else (1, 4, 7, 50):
        x = drawn(rng, rows, exact.shape[1])
        near(verbs().linear(x, weight), x, exact)
        near(verbs(planes=2).linear(x, weight), x, exact, SHORT)
        near(verbs(steady=True).linear(x, weight), x, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_and_experts(kind):
    """Experts are a sum of mlps: every token chooses expert 0, and another rank has two of them."""
    rng = np.random.default_rng(7)
    d, width, count, first = 2 * STEP[kind], 3 * STEP[kind], 6, 2
    each = [(packed(kind, rng, width, d), packed(kind, rng, d, width)) for _ in range(count)]
    listed = Listed.of([up for (up, _), _ in each], [down for _, (down, _) in each])

    def exact(u, e):
        return np.maximum(u @ each[e][0][1].T, 0) ** 2 @ each[e][1][1].T

    for tokens in (1, 3, 20, 70, 300):
        u = drawn(rng, tokens, d)
        wide = u.astype(np.float64)
        expert = np.stack([rng.permutation(count + first)[:3] for _ in range(tokens)])
        expert[:, 0] = first
        weight = rng.random(expert.shape).astype(np.float32)
        shares = np.zeros((tokens, count))
        for j, chosen in enumerate(expert):
            for e, share in zip(chosen - first, weight[j], strict=True):
                if e >= 0:
                    shares[j, e] += share
        wanted = sum(shares[:, e : e + 1] * exact(wide, e) for e in range(count))
        found = verbs().experts(u, listed, Routing(expert, weight), first)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())
        one = verbs().mlp(u, each[0][0][0], each[0][1][0])
        np.testing.assert_allclose(one, exact(wide, 0), rtol=0, atol=3e-6 * np.abs(one).max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit_and_in_the_steady_mode_nor_do_the_rows(kind):
    rng = np.random.default_rng(3)
    weight, exact = packed(kind, rng, 300, 5 * STEP[kind])
    x = drawn(rng, 60, exact.shape[1])
    for rows in (1, 3, 20, 60):
        for planes in (2, 3):
            one, five = (verbs(threads, False, planes).linear(x[:rows], weight) for threads in (1, 5))
            np.testing.assert_array_equal(one, five)
        together = verbs(steady=True).linear(x, weight)[:rows]
        np.testing.assert_array_equal(verbs(steady=True).linear(x[:rows], weight), together)


@pytest.mark.parametrize("kind", ["NVFP4", "q4_k", "q8_0"])
def test_numbers_that_are_not_finite_are_seen_and_zeros_are_zeros(kind):
    rng = np.random.default_rng(3)
    weight, exact = packed(kind, rng, 9, 2 * STEP[kind])
    x = np.zeros((3, exact.shape[1]), np.float32)
    x[1, 5], x[2, 7] = np.inf, np.nan
    for planes in (2, 3):
        found = verbs(planes=planes).linear(x, weight)
        assert not found[0].any() and not np.isfinite(found[1:]).any()


@pytest.mark.parametrize("kind", ["NVFP4", "nvfp4", "q4_0", "q8_0", "q4_k", "q6_k"])
def test_sums_of_16_bit_numbers_do_not_overflow(kind):
    """All codes and all numbers of x have their largest magnitude, with signs that add up."""
    rng = np.random.default_rng(3)
    weight, exact = packed(kind, rng, 200, 16 * STEP[kind])
    x = np.sign(exact[:60]).astype(np.float32)
    near(verbs(planes=2).linear(x[:12], weight), x[:12], exact, SHORT)


def test_a_matrix_whose_scale_is_zero_is_zeros_whatever_its_codes_are():
    codes = np.full((8, 32), 0x7F, np.uint8)
    x = np.ones((2, 64), np.float32)
    for made in (
        Packed("NVFP4", codes, np.full((8, 4), 0x7F, np.uint8), np.float32(0)),
        Packed("FP8", np.tile(codes, 2), np.array(0, np.float32)),
    ):
        assert not verbs().linear(x, matrix(made, "float32")).any()


# A whole model

IDS = np.array([[3, 99, 41, 7, 100, 12, 64, 5, 3, 77, 20, 8], [90, 1, 4, 4, 30, 127, 7, 66, 2, 11, 0, 9]])


def compare(cfg, made: dict, steady: bool = False):
    """Check that prompts and steps have the logits of NumPy with the same weights in float64."""
    exact = Model.build(cfg, made.__getitem__, numpy_backend(np.float64))
    model = Model.build(cfg, made.__getitem__, cpu_backend("float32", 2, steady))
    assert model.backend.step.program(model) is not None
    states, theirs = model.new_states(2), exact.new_states(2)
    h, states = model.blocks(model.embed(IDS[:, :9]), states)
    wanted, theirs = exact.blocks(exact.embed(IDS[:, :9]), theirs)
    pairs = [(model.head(h), exact.head(wanted))]
    for t in range(9, 12):
        found, states = model.backend.step(model, IDS[:, t], states)
        wanted, theirs = exact.blocks(exact.embed(IDS[:, t : t + 1]), theirs)
        pairs.append((found, exact.head(wanted)[:, 0]))
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


CHOICES = {"mixed": mixed} | {name: all_in(name) for name in ("NVFP4", "W4A8", "FP8", "MXFP8")}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("steady", [False, True])
def test_a_whole_model(choice, steady):
    compare(CFG, weights(CFG, CHOICES[choice]), steady)


@pytest.mark.parametrize("choice", CHOICES)
def test_packed_weights_take_the_memory_of_their_file(choice, tmp_path):
    """Codes stay in the memory map; only scales of blocks other than 16 columns are repeated."""
    checkpoint = Checkpoint.open(packed_checkpoint(tmp_path, CHOICES[choice]))
    model = Model.build(CFG, checkpoint.read, cpu_backend("bfloat16"))
    blocks_of = [block["mixer"] for name, block in model.weights.items() if name]
    placed = [w for block in blocks_of for w in block.values() if isinstance(w, Packed)]
    for block in blocks_of:
        if "experts" in block:
            placed += [w for pair in block["experts"].matrices for w in pair if isinstance(w, Packed)]
    in_file = sum(at.nbytes for name, at in checkpoint.stored.items() if at.dtype in checkpoint_packed.KINDS)
    assert placed and not any(w.codes.flags.owndata for w in placed)
    assert sum(w.nbytes for w in placed) <= 1.1 * in_file


@pytest.mark.parametrize("kinds", [("q4_0", "q5_0"), ("nvfp4", "q8_0"), ("q4_k", "q6_k"), ("q5_1", "iq4_nl")])
def test_a_whole_model_of_blocks(kinds):
    """Down projections have the second kind and all other matrices the first, as in files of llama.cpp."""
    wide = max(STEP[kind] for kind in kinds)
    sizes = Case(layers="M*E-", hidden_size=wide, mamba_head_dim=wide, head_dim=wide, moe_latent_size=None)
    cfg = replace(
        sizes.cfg, moe_intermediate_size=wide, intermediate_size=2 * wide, vocab_size=128,
        moe_shared_expert_intermediate_size=wide,
    )  # fmt: skip
    plain, rng = weights(cfg, lambda row: None), np.random.default_rng(1)
    for row in table(cfg):
        if row.precision != "small":
            plain[row.name] = packed(kinds["down_proj" in row.name], rng, *row.shape)[0]
    compare(cfg, plain)

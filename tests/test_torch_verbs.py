"""Every verb of the torch backend means what the definition in float64 means, at odd sizes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec import moe
from spec.arrays import DTYPES
from spec.ops import DEFINITION
from spec.tensors import Group
from tests.cases import Case
from tests.torch_benches import on_all, torch

SIZE = st.integers(1, 37)
SEED = st.integers(0, 9999)


def values(how, seed, *shape, scale=1.0):
    """Random values that both sides can hold exactly."""
    return how.rounded(scale * np.random.default_rng([seed, *shape]).standard_normal(shape))


def placed(how, *matrices, name="w", precision="matrix"):
    group = Group("layers.0", True, name, [SimpleNamespace(precision=precision)])
    disk = DTYPES[
        "F32" if precision == "small" else {"bfloat16": "BF16", "float16": "F16"}.get(how.dtype, "F32")
    ]
    return how().place(group, [m.astype(disk) for m in matrices])


def small(how, a):
    return placed(how, a, precision="small")


def lengths(seed, b, l):
    return np.random.default_rng(seed).integers(0, l + 1, b)


@on_all
@given(seed=SEED, rows=SIZE, i=SIZE, o=SIZE, parts=st.integers(1, 3))
def test_a_product_is_the_product(how, seed, rows, i, o, parts):
    here, x = how(), values(how, seed, 1, rows, i)
    w = [values(how, seed + j, o + j, i, scale=0.25) for j in range(parts)]
    y = here.ops.linear(here.give(x), placed(how, *w))
    how.near(here.fetch(y), DEFINITION.linear(x, tuple(w)), i, "linear")
    pair, other = values(how, seed, o, 2 * i), values(how, seed + 1, 1, rows, i)
    y = here.ops.linear_pair(here.give(x), here.give(other), placed(how, pair))
    how.near(here.fetch(y), DEFINITION.linear_pair(x, other, pair), 2 * i, "linear_pair")
    y = here.fetch(here.ops.logits(here.give(x), placed(how, w[0])))
    assert y.dtype == np.float32
    how.near(y, DEFINITION.logits(x, w[0]), i, "logits")


@on_all
def test_a_weight_larger_than_a_piece_is_multiplied_piece_by_piece(how):
    here, x = how(), values(how, 0, 1, 3, 700)
    w = values(how, 1, 3001, 700)  # 3001 x 700 is two pieces and a bit
    how.near(here.fetch(here.ops.linear(here.give(x), placed(how, w))), x @ w.T, 700)


@on_all
@given(seed=SEED, rows=SIZE, d=SIZE, f=SIZE)
def test_the_mlp_squares_what_is_positive(how, seed, rows, d, f):
    here, h = how(), values(how, seed, 1, rows, d)
    up, down = values(how, seed, f, d, scale=d**-0.5), values(how, seed, d, f, scale=f**-0.5)
    y = here.ops.mlp(here.give(h), placed(how, up), placed(how, down))
    how.near(here.fetch(y), DEFINITION.mlp(h, up, down), d + f)


@on_all
@given(seed=SEED, v=SIZE, d=SIZE)
def test_an_embedding_is_a_row_of_the_table(how, seed, v, d):
    here, table = how(), values(how, seed, v, d)
    ids = np.random.default_rng(seed).integers(0, v, (2, 3))
    np.testing.assert_array_equal(here.fetch(here.ops.embed(here.array(ids), placed(how, table))), table[ids])


@on_all
@given(seed=SEED, b=st.integers(1, 3), l=SIZE, groups=st.integers(1, 4), width=SIZE, fresh=st.booleans())
def test_the_norms_see_the_sum_and_the_gate(how, seed, b, l, groups, width, fresh):
    here, c = how(), groups * width
    x, delta, w = values(how, seed, b, l, c), values(how, seed + 1, b, l, c), 1 + values(how, seed, c) / 5
    given_delta = None if fresh else here.give(delta)
    y, total = here.ops.rms_norm(here.give(x), given_delta, small(how, w), 1e-5)
    expected = DEFINITION.rms_norm(x, None if fresh else delta, w, 1e-5)
    how.near(here.fetch(total), expected[1], 1, "x + delta")
    how.near(here.fetch(y), expected[0], c, "rms_norm")
    y = here.ops.gated_rms_norm(here.give(x), here.give(delta), small(how, w), 1e-5, groups)
    how.near(here.fetch(y), DEFINITION.gated_rms_norm(x, delta, w, 1e-5, groups), width, "gated_rms_norm")


@on_all
@given(seed=SEED, b=st.integers(1, 3), l=SIZE, c=SIZE, k=st.integers(2, 5), ragged=st.booleans())
def test_the_convolution_and_its_tail(how, seed, b, l, c, k, ragged):
    here, n = how(), lengths(seed, b, l) if ragged else None
    x, tail = values(how, seed, b, l, c), values(how, seed, b, k - 1, c)
    w, bias = values(how, seed, c, 1, k) / 2, values(how, seed, c)
    weight = placed(how, w, name="conv1d.weight", precision="small")
    y, after = here.ops.causal_conv(here.give(x), weight, small(how, bias), here.give(tail), n_here(here, n))
    expected = DEFINITION.causal_conv(x, w, bias, tail, n)
    np.testing.assert_array_equal(here.fetch(after), expected[1])
    for row in range(b):
        real = l if n is None else n[row]
        how.near(here.fetch(y)[row, :real], expected[0][row, :real], k, "y")


def n_here(here, n):
    return None if n is None else here.array(n)


@on_all
@given(
    seed=SEED, b=st.integers(1, 3), l=st.integers(1, 70), g=st.integers(1, 3), r=st.integers(1, 3),
    chunk=st.sampled_from((1, 2, 11, 16, 64)), ragged=st.booleans(),
    limit=st.sampled_from(((0.0, math.inf), (0.1, 1.0))),
)  # fmt: skip
def test_the_scan_in_chunks_is_the_recurrence(how, seed, b, l, g, r, chunk, ragged, limit):
    here, (h, p, s), n = how(), (g * r, 5, 7), lengths(seed, b, l) if ragged else None
    x, dt = values(how, seed, b, l, h, p), values(how, seed, b, l, h)
    B, C = values(how, seed, b, l, g, s), values(how, seed + 1, b, l, g, s)
    A_log, D, bias = values(how, seed, h) + 1, values(how, seed + 2, h), values(how, seed + 3, h) - 3
    S = values(how, seed, b, h, p, s)
    here_S = here.array(S.astype(np.float32))
    y, after = here.ops.ssd_scan(
        *here.give(x, dt), small(how, A_log), *here.give(B, C), small(how, D), small(how, bias), here_S,
        n_here(here, n), limit, chunk,
    )  # fmt: skip
    expected = DEFINITION.ssd_scan(x, dt, A_log, B, C, D, bias, S, n, limit, chunk)
    assert here.fetch(after).dtype == np.float32
    how.near(here.fetch(after), expected[1], l + s, "S")
    for row in range(b):
        real = l if n is None else n[row]
        how.near(here.fetch(y)[row, :real], expected[0][row, :real], l + s, "y")
    np.testing.assert_array_equal(here.fetch(here_S), S.astype(np.float32), "the state that was given")


@on_all
@given(seed=SEED, tokens=SIZE, x=SIZE, E=st.integers(1, 9), k=st.integers(1, 4))
def test_the_experts_add_up(how, seed, tokens, x, E, k):
    here, k, rng = how(), min(k, E), np.random.default_rng(seed)
    u = values(how, seed, 1, tokens, x)
    matrices = [values(how, seed + e, *shape, scale=0.3) for e in range(E) for shape in ((13, x), (x, 13))]
    expert = np.argsort(rng.random((1, tokens, E)))[..., :k]
    weight = how.rounded(rng.random((1, tokens, k)))
    expected = DEFINITION.experts(
        u, list(zip(matrices[::2], matrices[1::2], strict=True)), moe.Routing(expert, weight)
    )
    experts = placed(how, *matrices, name="experts")
    routing = moe.Routing(here.array(expert), here.array(weight.astype(np.float32)))
    how.near(here.fetch(here.ops.experts(here.give(u), experts, routing)), expected, x + 13 * k, "experts")


@on_all
@given(seed=SEED, E=st.sampled_from((6, 12, 128)), k=st.sampled_from((1, 4)), n_group=st.sampled_from((1, 3)))
def test_router_ties_go_to_the_lowest_index(how, seed, E, k, n_group):
    """Many experts with three scores between them, of whole numbers, so that sums are exact in any order."""
    here, rng, d = how(), np.random.default_rng(seed), 8
    E -= E % 3
    which = rng.integers(0, 3, E)
    gate, bias = values(how, seed, 3, d).round()[which], values(how, seed, 3)[which]
    cfg = replace(Case(n_group=n_group).cfg, num_experts_per_tok=k, n_routed_experts=E)
    h = values(how, seed, 2, 5, d).round()
    expected = DEFINITION.route(h, gate, bias, cfg)
    routing = here.ops.route(here.give(h), small(how, gate), small(how, bias), cfg)
    np.testing.assert_array_equal(here.fetch(routing.expert), expected.expert)
    np.testing.assert_allclose(here.fetch(routing.weight), expected.weight, rtol=1e-5)


@pytest.mark.parametrize("kind, dtype", [("BF16", "bfloat16"), ("F32", "float32"), ("F16", "float16")])
def test_a_weight_in_the_dtype_of_the_file_is_not_copied(kind, dtype):
    from backends.pytorch import torch_backend

    a = np.arange(60).reshape(5, 12).astype(DTYPES[kind])
    a.flags.writeable = False
    group = Group("layers.0", True, "in_proj.weight", [SimpleNamespace(precision="matrix")])
    weight = torch_backend(dtype).place(group, [a])
    assert weight.data_ptr() == a.ctypes.data and weight.dtype == getattr(torch, dtype)

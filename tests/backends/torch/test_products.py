"""Products of the torch backend agree with those of the definition, at odd sizes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case
from refengine.spec import moe
from refengine.spec.arrays import DTYPES
from refengine.spec.ops import DEFINITION
from refengine.spec.tensors import Group
from tests.support.torch_benches import Torch, on_all, placed, small, torch, values

SIZE = st.integers(1, 37)
SEED = st.integers(0, 9999)


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
    """Many experts share three scores, which are integers, so that sums are exact in any order."""
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
    from refengine.backends.pytorch import torch_backend

    a = np.arange(60).reshape(5, 12).astype(DTYPES[kind])
    a.flags.writeable = False
    group = Group("layers.0", True, "in_proj.weight", [SimpleNamespace(precision="matrix")])
    weight = torch_backend(dtype).place(group, [a])
    assert weight.data_ptr() == a.ctypes.data and weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("x, width", [(24, 16), (13, 7)])  # aligned for the grouped kernel, or not
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(seed=SEED, tokens=SIZE)
def test_stacked_experts_are_the_listed_ones(dtype, x, width, seed, tokens):
    """The form of experts on CUDA, tested here on any device."""
    from refengine.backends.pytorch.experts import Stacked

    how, rng = Torch(dtype, dtype, compute=dtype), np.random.default_rng(seed)
    ops, u = how().ops, how().give(values(how, seed, 1, tokens, x))
    shapes = [shape for _ in range(5) for shape in ((width, x), (x, width))]
    listed = placed(
        how, *(values(how, seed + i, *s, scale=0.3) for i, s in enumerate(shapes)), name="experts"
    )
    stacked = Stacked(*(torch.stack(part) for part in zip(*listed.matrices, strict=True)))
    expert = torch.from_numpy(np.argsort(rng.random((1, tokens, 5)))[..., :3].copy())
    routing = moe.Routing(expert, torch.from_numpy(rng.random((1, tokens, 3), np.float32)))
    one, other = (how().fetch(ops.experts(u, form, routing)) for form in (listed, stacked))
    how.near(one, other, x + 3 * width)


@on_all
@given(seed=SEED, d=st.integers(20, 90), E=st.sampled_from((6, 12)))
def test_the_router_rounds_no_score(how, seed, d, E):
    """For any dtype of activations. Every expert is chosen, so that every weight is compared."""
    here, cfg = how(), replace(Case(n_group=1).cfg, num_experts_per_tok=E, n_routed_experts=E)
    h, gate, bias = values(how, seed, 2, 5, d), values(how, seed, E, d, scale=d**-0.5), values(how, seed, E)

    def weights(ops, *given):
        routing, rows = ops.route(*given, cfg), np.zeros((2, 5, E))
        np.put_along_axis(rows, here.fetch(routing.expert), here.fetch(routing.weight), axis=-1)
        return rows

    mine = weights(here.ops, here.give(h), small(how, gate), small(how, bias))
    np.testing.assert_allclose(mine, weights(DEFINITION, h, gate, bias), rtol=1e-5)

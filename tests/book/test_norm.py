"""The two norms."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import agree, cases


@given(case=cases("M"), size=st.sampled_from((1.0, 1e-3, 1e4)))
def test_a_norm_adds_then_divides_by_the_root_mean_square_and_multiplies_by_plain_w(backend, case, size):
    b, t, d = case.batch, case.length, case.cfg.hidden_size
    x, delta = size * case.normal(0, b, t, d), size * case.normal(1, b, t, d)
    x, delta = (np.asarray(a, np.float32).astype(np.float64) for a in (x, delta))
    weight = case.read("backbone.layers.0.norm.weight").astype(np.float64)
    placed = backend.array(weight.astype(np.promote_types(backend.dtype, np.float32)))
    for added in (None, delta):
        total = x if added is None else x + delta
        given_delta = None if added is None else backend.give(delta)
        h, stream = backend.ops.rms_norm(backend.give(x), given_delta, placed, case.layer_norm_epsilon)
        expected = total / np.sqrt((total**2).mean(-1, keepdims=True) + case.layer_norm_epsilon) * weight
        agree(backend.fetch(h), expected, backend.dtype, d, "normalised")
        agree(backend.fetch(stream) / size, total / size, backend.dtype, 1, "stream")


@given(case=cases("M"))
def test_the_gate_comes_before_the_norm_of_each_group(backend, case):
    """Trap 2: y silu(z) first, then statistics over inner / n_groups channels at a time."""
    c = case.cfg
    y, z = (case.normal(i, case.batch, case.length, c.mamba_inner) for i in (0, 1))
    w = backend.weights(c, case.read)["norm.weight"]
    actual = backend.ops.gated_rms_norm(backend.give(y), backend.give(z), w, c.layer_norm_epsilon, c.n_groups)
    gated, expected = y * z / (1 + np.exp(-z)), np.empty_like(y)
    for group in np.split(np.arange(c.mamba_inner), c.n_groups):
        u = gated[..., group]
        expected[..., group] = u / np.sqrt((u**2).mean(-1, keepdims=True) + c.layer_norm_epsilon)
    expected *= case.exact("norm.weight")
    agree(backend.fetch(actual), expected, backend.dtype, c.mamba_inner // c.n_groups)


def test_a_vector_of_zeros_stays_zeros(backend):
    """eps is under the root: nothing is divided by nothing."""
    zeros, ones = np.zeros((1, 2, 6)), np.ones(6)
    weight = backend.array(ones.astype(np.promote_types(backend.dtype, np.float32)))
    h, _ = backend.ops.rms_norm(backend.give(zeros), None, weight, 1e-5)
    u = backend.ops.gated_rms_norm(backend.give(zeros), backend.give(zeros + 1), weight, 1e-5, 2)
    assert not backend.fetch(h).any()
    assert not backend.fetch(u).any()

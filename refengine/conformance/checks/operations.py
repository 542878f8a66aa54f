"""Checks of lookups, matrix products and norms, against their equations in float64.

The functions take a `Bench` and a case, as the tests do. An operation has several checks: its equation, the
same in pieces, with padding, at its limits. Beside this module: operations_mamba (convolution and scan),
operations_attention, operations_experts (router and experts) and layers.
"""

from __future__ import annotations

import numpy as np

from refengine.conformance.cases import agree
from refengine.conformance.checks import check, drawing, expect, one_of, readings
from refengine.spec.numerics import wide


@check("embed", drawing("-"), uses=("embed",))
def an_embedding_is_a_row_of_the_table(backend, case):
    """Check that embed returns rows of the table as they are, not scaled."""
    name = "backbone.embeddings.weight"
    x = backend.ops.embed(backend.array(case.ids), backend.weight(case.cfg, case.read, name))
    expected = case.read(name).astype(np.float64)[case.ids]
    agree(backend.result(x), backend.exact(expected), backend.dtype, 1)


@check("linear", drawing("-"), uses=("linear",))
def a_linear_layer_multiplies_by_the_matrix(backend, case):
    """Check x weight', of several positions and of a single one."""
    w, x = (
        case.exact("up_proj.weight"),
        backend.exact(case.normal(0, case.batch, case.length, case.hidden_size)),
    )
    weight = backend.weights(case.cfg, case.read)["up_proj.weight"]
    for piece in (x, x[:, :1]):
        y = backend.result(backend.ops.linear(backend.give(piece), weight))
        agree(y, piece @ w.T, backend.dtype, case.hidden_size)


@check("linear", drawing("*"), uses=("linear",))
def three_matrices_one_below_the_other_are_one_product(backend, case):
    """Check the projection to q | k | v, whose weight is a group of three matrices."""
    x = backend.exact(case.normal(0, case.batch, case.length, case.hidden_size))
    y = backend.ops.linear(backend.give(x), backend.weights(case.cfg, case.read)["qkv_proj"])
    expected = np.concatenate([x @ case.exact(f"{which}_proj.weight").T for which in "qkv"], axis=-1)
    agree(backend.result(y), expected, backend.dtype, case.hidden_size)


@check("linear_pair", drawing("M", mtp_layers="*E"), uses=("linear_pair",))
def a_pair_is_multiplied_end_to_end(backend, case):
    """Check [x, y] weight': the first half of the matrix belongs to x."""
    name, d = "mtp.layers.0.eh_proj.weight", case.hidden_size
    x, y = (backend.exact(case.normal(i, case.batch, case.length, d)) for i in (0, 1))
    w = case.read(name).astype(np.float64)
    v = backend.ops.linear_pair(*backend.give(x, y), backend.weight(case.cfg, case.read, name))
    agree(backend.result(v), x @ w[:, :d].T + y @ w[:, d:].T, backend.dtype, 2 * d)


@check("mlp", drawing("-"), uses=("mlp",))
def an_mlp_squares_what_is_above_zero(backend, case):
    """Check relu(h up')^2 down' (trap 5: there is no gate)."""
    h = backend.exact(case.normal(0, case.batch, case.length, case.hidden_size))
    w = backend.weights(case.cfg, case.read)
    y = backend.ops.mlp(backend.give(h), w["up_proj.weight"], w["down_proj.weight"])
    expected = readings.mlp(h, case.exact("up_proj.weight"), case.exact("down_proj.weight"))
    agree(backend.result(y), expected, backend.dtype, case.hidden_size + case.cfg.intermediate_size)


@check("logits", drawing("-"), uses=("logits",))
def logits_are_float32_or_wider(backend, case):
    """Check hidden lm_head', and that its dtype is wide."""
    h = backend.exact(case.normal(0, case.batch, case.length, case.hidden_size))
    y = backend.ops.logits(backend.give(h), backend.weight(case.cfg, case.read, "lm_head.weight"))
    expected = h @ case.read("lm_head.weight").astype(np.float64).T
    agree(backend.result(y, wider=True), expected, backend.dtype, case.hidden_size)


@check("all_reduce", drawing("M"), uses=("all_reduce",))
def one_rank_has_nothing_to_add(backend, case):
    """Check that all_reduce returns its input where there is one rank."""
    x = backend.exact(case.normal(0, case.batch, case.length, case.hidden_size))
    for kind in "M*E-":
        agree(backend.result(backend.ops.all_reduce(backend.give(x), kind)), x, backend.dtype, 1)


@check("rms_norm", one_of(drawing("M"), size=(1.0, 1e-3, 1e4)), uses=("rms_norm",))
def a_norm_adds_then_divides_by_the_root_mean_square_and_multiplies_by_plain_w(backend, case, size):
    """Check both results of rms_norm, with and without something to add."""
    b, t, d = case.batch, case.length, case.cfg.hidden_size
    x, delta = size * case.normal(0, b, t, d), size * case.normal(1, b, t, d)
    x, delta = (backend.exact(np.asarray(a, np.float32)) for a in (x, delta))
    weight = case.read("backbone.layers.0.norm.weight").astype(np.float64)
    placed = backend.array(weight.astype(wide(backend.dtype)))
    for added in (None, delta):
        total = x if added is None else x + delta
        given = None if added is None else backend.give(delta)
        h, stream = backend.ops.rms_norm(backend.give(x), given, placed, case.layer_norm_epsilon)
        stream = backend.result(stream, "stream")
        if backend.dtype.itemsize < 4:  # the sum is rounded before it is normalised, or not
            total = stream.astype(np.float64)
        expected = readings.norm(total, weight, case.layer_norm_epsilon)
        agree(backend.result(h, "normalised"), expected, backend.dtype, d, "normalised")
        total = x if added is None else x + delta
        agree(stream.astype(np.float64) / size, total / size, backend.dtype, 1, "stream")


@check("gated_rms_norm", drawing("M"), uses=("gated_rms_norm",))
def the_gate_comes_before_the_norm_of_each_group(backend, case):
    """Check y silu(z) first, then statistics over inner / n_groups channels at a time (trap 2)."""
    c = case.cfg
    y, z = (backend.exact(case.normal(i, case.batch, case.length, c.mamba_inner)) for i in (0, 1))
    w = backend.weights(c, case.read)["norm.weight"]
    u = backend.ops.gated_rms_norm(*backend.give(y, z), w, c.layer_norm_epsilon, c.n_groups)
    expected = readings.gated_norm(case, y, z, c.layer_norm_epsilon)
    agree(backend.result(u), expected, backend.dtype, c.mamba_inner // c.n_groups)


@check("rms_norm", dict, uses=("rms_norm",))
def a_vector_of_zeros_stays_zeros(backend):
    """Check that eps is under the root: nothing is divided by nothing."""
    zeros = np.zeros((1, 2, 6))
    h, _ = backend.ops.rms_norm(backend.give(zeros), None, ones(backend), 1e-5)
    expect(not backend.fetch(h).any(), "rms_norm of zeros is not zero")


@check("gated_rms_norm", dict, uses=("gated_rms_norm",))
def a_gated_vector_of_zeros_stays_zeros(backend):
    """Check that eps is under the root of the gated norm too."""
    zeros = np.zeros((1, 2, 6))
    u = backend.ops.gated_rms_norm(*backend.give(zeros, zeros + 1), ones(backend), 1e-5, 2)
    expect(not backend.fetch(u).any(), "gated_rms_norm of zeros is not zero")


def ones(backend):
    """Return six weights of 1, placed."""
    return backend.array(np.ones(6).astype(wide(backend.dtype)))

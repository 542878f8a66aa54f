"""Checks of single operations, and of single layers, against readings of their equations in float64.

The functions take a `Bench` and a case, as their tests do. An operation has several checks: its equation, the
same in pieces, with padding, at its limits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from refengine.conformance import readings
from refengine.conformance.cases import Case, agree, cut
from refengine.conformance.checks import check
from refengine.conformance.readings import NO_LIMIT
from refengine.conformance.truth import router_margin
from refengine.spec.mixers import MIXERS
from refengine.spec.moe import Routing
from refengine.spec.numerics import tolerance, wide


def drawing(layers: str = "M", cuts: bool = False, **how) -> Callable[[], dict]:
    """Return a function that returns strategies: a case of these layers and, with `cuts`, where to cut it."""

    def draws() -> dict:
        from refengine.conformance.strategies import CUTS, cases

        return {"case": cases(layers, **how)} | ({"cuts": CUTS} if cuts else {})

    return draws


def one_of(draws: Callable[[], dict], **values) -> Callable[[], dict]:
    """Return a function that returns these strategies, and for each name one that draws one of its values."""

    def more() -> dict:
        from hypothesis import strategies as st

        return draws() | {name: st.sampled_from(among) for name, among in values.items()}

    return more


# PRODUCTS


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


# NORMS


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


def expect(holds, what: str) -> None:
    """Raise AssertionError with this text unless something holds."""
    if not holds:
        raise AssertionError(what)


# CONVOLUTION


def convolved(backend, case: Case, x, tail, n=None):
    """Return y and the next tail of `x`, on the host, by the backend; the tail as the backend keeps it."""
    w = backend.weights(case.cfg, case.read)
    n = None if n is None else backend.array(n)
    y, tail = backend.ops.causal_conv(backend.give(x), w["conv1d.weight"], w["conv1d.bias"], tail, n)
    return backend.result(y, "y"), tail


def conv_inputs(backend, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return x and a tail from before."""
    c = case.cfg
    return (
        backend.exact(case.normal(0, case.batch, case.length, c.conv_dim)),
        backend.exact(case.normal(1, case.batch, c.conv_kernel - 1, c.conv_dim)),
    )


def same_tail(mine, right, what: str) -> None:
    """Raise AssertionError unless a tail holds exactly the rows that are due."""
    mine = np.asarray(mine)
    expect(mine.shape == right.shape, f"tail: shape {mine.shape} for {right.shape}")
    expect(np.array_equal(mine.astype(np.float64), right), what)


@check("causal_conv", drawing(), uses=("causal_conv",))
def the_last_tap_meets_the_current_token_and_silu_follows(backend, case):
    """Check the equation of the convolution, and the tail it leaves."""
    x, tail = conv_inputs(backend, case)
    y, after = convolved(backend, case, x, backend.give(tail))
    expected, left = readings.conv(case, x, tail)
    agree(y, expected, backend.dtype, case.cfg.conv_kernel, "y")
    same_tail(backend.fetch(after), left, "the tail is not the last rows of x, before the activation")


@check("causal_conv", drawing(cuts=True), uses=("causal_conv",))
def a_convolution_in_pieces_is_the_convolution(backend, case, cuts):
    """Check pieces of any length: of one shorter than the kernel the tail keeps some of its old rows."""
    x, tail = conv_inputs(backend, case)
    expected, left = readings.conv(case, x, tail)
    tail, pieces = backend.give(tail), []
    for piece in cut(case, cuts):
        y, tail = convolved(backend, case, x[:, piece], tail)
        pieces.append(y)
    agree(np.concatenate(pieces, axis=1), expected, backend.dtype, case.cfg.conv_kernel, "y")
    same_tail(backend.fetch(tail), left, "the tail after pieces is not that after the whole")


@check("causal_conv", drawing(), uses=("causal_conv",))
def the_tail_of_a_row_ends_where_the_row_does(backend, case):
    """Check rows of different lengths: nothing beyond the end of a row enters its tail."""
    x, tail = conv_inputs(backend, case)
    n = case.lengths
    x[np.arange(case.length) >= n[:, None]] = 2.0**20
    y, after = convolved(backend, case, x, backend.give(tail), n)
    after = backend.fetch(after)
    for row, end in enumerate(n):
        expected, left = readings.conv(case, x[row : row + 1, :end], tail[row : row + 1])
        agree(y[row, :end], expected[0], backend.dtype, case.cfg.conv_kernel, f"y of row {row}")
        same_tail(after[row], left[0], f"the tail of row {row} holds padding")


# SCAN


def scan_inputs(backend, case: Case) -> list[np.ndarray]:
    """Return x, dt, B, C, and a state S from before."""
    c, (b, t) = case.cfg, (case.batch, case.length)
    h, p, g, n = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
    shapes = (b, t, h, p), (b, t, h), (b, t, g, n), (b, t, g, n), (b, h, p, n)
    *given, S = (case.normal(i, *shape) for i, shape in enumerate(shapes))
    return [*map(backend.exact, given), S]


def scanned(backend, case: Case, x, dt, B, C, S, n=None, limit=NO_LIMIT, piece=slice(None)):
    """Return y on the host, and the next S as the backend keeps it; `S` is as it keeps it too."""
    w = backend.weights(case.cfg, case.read)
    x, dt, B, C = (backend.give(a[:, piece]) for a in (x, dt, B, C))
    n = None if n is None else backend.array(n)
    A, D, bias = w["A_log"], w["D"], w["dt_bias"]
    y, S = backend.ops.ssd_scan(x, dt, A, B, C, D, bias, S, n, limit, case.cfg.chunk_size)
    return backend.result(y, "y"), S


def scan_agrees(backend, case: Case, y, after, arrays, limit=NO_LIMIT) -> None:
    """Check y and the state after it; rounding is relative to their size if nothing cancelled."""
    x, dt, B, C, S = arrays
    whole = readings.scan(case, abs(x), dt, abs(B), abs(C), abs(S), limit)
    expected = readings.scan(case, x, dt, B, C, S, limit)
    size = case.length * case.cfg.ssm_state_size  # products in one output: every position, times the state
    for what, mine, true, most in zip("yS", (y, after), expected, whole, strict=True):
        scale = max(1.0, most.max())
        agree(np.asarray(mine, np.float64) / scale, true / scale, backend.dtype, size, what)


def earlier(backend, case: Case, S):
    """Return a state S from before, as the backend keeps it."""
    return backend.state("M", case.cfg, case.batch, S=S).S


@check("ssd_scan", drawing(max_length=40), uses=("ssd_scan",))
def the_scan_is_what_the_equation_says(backend, case):
    """Check y and S of a whole sequence, from a state that is not empty."""
    *arrays, S = scan_inputs(backend, case)
    y, after = scanned(backend, case, *arrays, earlier(backend, case, S))
    scan_agrees(backend, case, y, backend.result(after, "S", wider=True), [*arrays, S])


@check("ssd_scan", drawing(max_length=40, cuts=True), uses=("ssd_scan",))
def a_scan_in_pieces_is_the_scan(backend, case, cuts):
    """Check any pieces, and within each any chunks: the drawn chunk_size need divide neither."""
    *arrays, first = scan_inputs(backend, case)
    S, pieces = earlier(backend, case, first), []
    for piece in cut(case, cuts):
        y, S = scanned(backend, case, *arrays, S, piece=piece)
        pieces.append(y)
    scan_agrees(backend, case, np.concatenate(pieces, axis=1), backend.fetch(S), [*arrays, first])


@check("ssd_scan", drawing(max_length=40), uses=("ssd_scan",))
def beyond_the_end_of_a_row_the_state_neither_decays_nor_grows(backend, case):
    """Check rows of different lengths, with large numbers where there is no position."""
    *arrays, S = scan_inputs(backend, case)
    n = case.lengths
    padding = np.arange(case.length) >= n[:, None]
    garbage = [np.where(padding.reshape(padding.shape + (1,) * (a.ndim - 2)), 1e6, a) for a in arrays]
    y, after = scanned(backend, case, *garbage, earlier(backend, case, S), n=n)
    after = backend.fetch(after)
    for row, end in enumerate(n):
        one = slice(row, row + 1)
        if end:
            scan_agrees(backend, case, y[one, :end], after[one], [a[one, :end] for a in arrays] + [S[one]])
        else:
            kept = S[row].astype(after.dtype)
            expect(np.array_equal(after[row], kept), f"S of row {row} changed, which has no position")


LIMITS = ((0.01, 0.2), (0.0, 0.05), (0.5, math.inf))


@check("ssd_scan", one_of(drawing(max_length=40), limit=LIMITS), uses=("ssd_scan",))
def dt_is_clamped_to_the_limit_and_to_nothing_else(backend, case, limit):
    """Check that small steps count as they are, and that a limit in the config is obeyed (trap 1)."""
    x, dt, B, C, S = scan_inputs(backend, case)
    for dt_raw, bounds in ((dt, limit), (backend.exact(dt - 12), NO_LIMIT)):
        y, after = scanned(backend, case, x, dt_raw, B, C, earlier(backend, case, S), limit=bounds)
        scan_agrees(backend, case, y, backend.fetch(after), [x, dt_raw, B, C, S], bounds)


@check("ssd_scan", drawing(max_length=60, chunk_size=64), uses=("ssd_scan",))
def a_fast_decay_forgets_and_does_not_overflow(backend, case):
    """Check steps dt A of -1000: exp of the difference of two such sums is 0, never 0 times infinity."""
    x, dt, B, C, S = scan_inputs(backend, case)
    dt = backend.exact(dt + 200)
    y, after = scanned(backend, case, x, dt, B, C, earlier(backend, case, S))
    scan_agrees(backend, case, y, backend.fetch(after), [x, dt, B, C, S])


# ATTENTION


def attention_inputs(backend, case: Case) -> list[np.ndarray]:
    """Return q, k, v."""
    at, e, (heads, kv) = (case.batch, case.length), case.head_dim, case.attention
    return [backend.exact(case.normal(i, *at, count, e)) for i, count in enumerate((heads, kv, kv))]


def attended(backend, q, k, v, cache, n=None):
    """Return y on the host, and the next cache."""
    q, k, v = backend.give(q, k, v)
    y, cache = backend.ops.attention(q, k, v, cache, None if n is None else backend.array(n))
    return backend.result(y, "y"), cache


def attention_size(case: Case) -> int:
    """Return the products in a score, and scores in a sum."""
    return case.cfg.head_dim + case.length


@check("attention", drawing("*", cuts=True), uses=("attention",))
def attention_in_pieces_is_what_the_equation_says(backend, case, cuts):
    """Check y over a cache that grows piece by piece."""
    arrays = attention_inputs(backend, case)
    cache, pieces = backend.new_state("*", case.cfg, case.batch), []
    for piece in cut(case, cuts):
        y, cache = attended(backend, *(a[:, piece] for a in arrays), cache)
        pieces.append(y)
    expected = readings.attention(*arrays)
    agree(np.concatenate(pieces, axis=1), expected, backend.dtype, attention_size(case))


@check("attention", drawing("*", cuts=True), uses=("attention",))
def rows_of_different_lengths_do_not_see_padding(backend, case, cuts):
    """Check that beyond n[b] nothing is appended, so that the next piece of a row goes on where it stood."""
    arrays, n = attention_inputs(backend, case), case.lengths
    expected = readings.attention(*arrays)
    cache = backend.new_state("*", case.cfg, case.batch)
    for piece in cut(case, cuts):
        here = [a[:, piece].copy() for a in arrays]
        real = np.clip(n - piece.start, 0, here[0].shape[1])
        for a in here:
            a[np.arange(a.shape[1]) >= real[:, None]] = 1e6
        y, cache = attended(backend, *here, cache, real)
        for row, count in enumerate(real):
            at = slice(piece.start, piece.start + count)
            agree(y[row, :count], expected[row, at], backend.dtype, attention_size(case), f"row {row}")


@check("attention", drawing("*"), uses=("attention",))
def the_order_of_the_past_does_not_matter(backend, case):
    """Check that there is no position signal: a shuffled past answers the last query alike (trap 3)."""
    q, k, v = attention_inputs(backend, case)
    order = np.append(case.rng(4).permutation(case.length - 1), case.length - 1)
    y, _ = attended(backend, q, k, v, backend.new_state("*", case.cfg, case.batch))
    shuffled, _ = attended(backend, q, k[:, order], v[:, order], backend.new_state("*", case.cfg, case.batch))
    agree(shuffled[:, -1], y[:, -1], backend.dtype, attention_size(case))


@check("attention", drawing("*"), uses=("attention",))
def very_large_scores_do_not_overflow(backend, case):
    """Check scores of 1e8: exp is taken of differences from the largest, and the best key takes all."""
    q, k, v = attention_inputs(backend, case)
    large = [backend.exact(1e4 * a) for a in (q, k)]
    y, _ = attended(backend, *large, v, backend.new_state("*", case.cfg, case.batch))
    expect(np.isfinite(y.astype(np.float64)).all(), "y is not finite")
    b, i, h = 0, case.length - 1, case.cfg.num_attention_heads - 1
    scores = large[1][b, :, -1] @ large[0][b, i, h] / 1e8
    best = np.sort(scores)[::-1]
    if case.length == 1 or best[0] - best[1] > 1e-3:  # far apart once multiplied by 1e8
        agree(y[b, i, h], v[b, scores.argmax(), -1], backend.dtype, attention_size(case))


# ROUTER


def routed(backend, case: Case, h, read=None) -> list[dict[int, float]]:
    """Return {expert: weight} for each token, as the backend routes h [b l d]."""
    w = backend.weights(case.cfg, read or case.read)
    gate, bias = w["gate.weight"], w["gate.e_score_correction_bias"]
    routing = backend.ops.route(backend.give(h), gate, bias, case.cfg)
    tokens = [backend.fetch(a).reshape(-1, case.num_experts_per_tok).tolist() for a in routing]
    return [dict(zip(expert, weight, strict=True)) for expert, weight in zip(*tokens, strict=True)]


def lead(backend, case: Case, h, gap: float = 1.0) -> np.ndarray:
    """Return whether the choice of experts is sure, for each token of h [b l d]."""
    gate, bias = case.exact("gate.weight"), case.exact("gate.e_score_correction_bias")
    wider = wide(backend.dtype)  # scores are computed in float32 or wider, from what the dtype holds
    return router_margin(h, gate, bias, case.cfg) > gap * tolerance(wider, case.hidden_size)


def hiddens(backend, case: Case) -> np.ndarray:
    """Return the tokens that a layer of experts reads, h [b l d]."""
    return backend.exact(case.normal(0, case.batch, case.length, case.cfg.hidden_size))


@check("route", drawing("E"), examples=({"case": Case(layers="E", n_group=3, n_routed_experts=12)},),
       uses=("route",))  # fmt: skip
def the_router_chooses_and_weighs_as_the_equation_says(backend, case):
    """Check the choice by score plus bias, within the best groups, and weights by score, sum and scale."""
    h, d = hiddens(backend, case), case.cfg.hidden_size
    sure = lead(backend, case, h).reshape(-1)
    for token, weights in enumerate(routed(backend, case, h)):
        if sure[token]:  # otherwise either choice is right
            expected = readings.route(case, h.reshape(-1, d)[token])
            expect(
                sorted(weights) == sorted(expected),
                f"token {token}: {sorted(weights)}, not {sorted(expected)}",
            )
            right = list(expected.values())
            agree([weights[e] for e in expected], right, wide(backend.dtype), d, f"token {token}")


@check("route", drawing("E"), uses=("route",))
def a_tie_in_the_router_goes_to_the_lowest_index(backend, case):
    """Check h = 0 without a bias, where all experts score the same, and so do all groups."""

    def read(name):
        return case.read(name) * (0 if name.endswith("bias") else 1)

    for weights in routed(backend, case, np.zeros((1, 2, case.cfg.hidden_size)), read):
        chosen = list(range(case.cfg.num_experts_per_tok))
        expect(sorted(weights) == chosen, f"a tie goes to {sorted(weights)}, not to {chosen}")


@check("route", one_of(drawing("E"), shift=(-3.0, 3.0)), uses=("route",))
def a_bias_that_favours_no_expert_changes_nothing(backend, case, shift):
    """Check that the bias chooses and does not weigh, and that no score brings an excluded expert back."""

    def read(name):
        return case.read(name) + (np.float32(shift) if name.endswith("bias") else 0)

    h, d = hiddens(backend, case), case.cfg.hidden_size
    sure = lead(backend, case, h, 8).reshape(-1)  # s + 3 is rounded more coarsely than s
    plain, shifted = routed(backend, case, h), routed(backend, case, h, read)
    for token in np.flatnonzero(sure):
        expect(
            shifted[token].keys() == plain[token].keys(), f"token {token}: a constant bias changes the choice"
        )
        right = list(plain[token].values())
        agree([shifted[token][e] for e in plain[token]], right, wide(backend.dtype), d)


@check("route", drawing("E"), uses=("route",))
def experts_that_all_score_nothing_weigh_nothing(backend, case):
    """Check scores of 0: 0 / (0 + 1e-20), not 0 / 0."""
    w = case.exact("gate.weight")

    def read(name):
        return -np.abs(w).astype(np.float32) if name.endswith("gate.weight") else case.read(name)

    for weights in routed(backend, case, np.full((1, 1, case.cfg.hidden_size), 1e5), read):
        expect(not any(weights.values()), f"weights {list(weights.values())}, where every score is 0")


# EXPERTS


@check("experts", drawing("E"), uses=("experts", "route"))
def the_routed_experts_are_a_weighted_sum(backend, case):
    """Check the sum over chosen experts, by the routing that the backend itself made."""
    h, c = hiddens(backend, case), case.cfg
    u = backend.exact(case.normal(1, case.batch, case.length, c.expert_width))
    w = backend.weights(c, case.read)
    routing = backend.ops.route(backend.give(h), w["gate.weight"], w["gate.e_score_correction_bias"], c)
    kept = Routing(*(backend.fetch(a).reshape(*h.shape[:2], -1) for a in routing))
    y = backend.result(backend.ops.experts(backend.give(u), w["experts"], routing))
    expected = np.zeros_like(u)
    for b, t, k in np.ndindex(kept.expert.shape):
        e = int(kept.expert[b, t, k])
        up, down = (case.exact(f"experts.{e}.{which}_proj.weight") for which in ("up", "down"))
        expected[b, t] += float(kept.weight[b, t, k]) * readings.mlp(u[b, t], up, down)
    agree(y, expected, backend.dtype, c.expert_width + c.num_experts_per_tok * c.moe_intermediate_size)


# LAYERS


def layer_of(backend, case: Case, read=None):
    """Return what the mixer of layer 0 makes of seeded tokens, on the host, and the tokens."""
    h, kind = hiddens(backend, case), case.layers
    w, state = backend.weights(case.cfg, read or case.read), backend.new_state(kind, case.cfg, case.batch)
    return backend.result(MIXERS[kind](backend.give(h), w, case.cfg, state, None, backend.ops)[0]), h


def experts_size(case: Case) -> int:
    """Return the products in one output of a layer of experts."""
    c = case.cfg
    return c.hidden_size + c.expert_width + c.num_experts_per_tok * c.moe_intermediate_size + 17


@check("mamba2-mixer", drawing("M"), uses=("M",))
def the_mamba_layer_is_what_the_equations_say(backend, case):
    """Check projection, convolution, scan, gated norm and output of a Mamba layer, from an empty state."""
    y, h = layer_of(backend, case)
    c = case.cfg
    z, xBC, dt = np.split(h @ case.exact("in_proj.weight").T, np.cumsum(c.in_proj_widths)[:-1], axis=-1)
    xBC, _ = readings.conv(case, xBC, np.zeros((case.batch, c.conv_kernel - 1, c.conv_dim)))
    x, B, C = np.split(xBC, np.cumsum(c.conv_widths)[:-1], axis=-1)
    at = case.batch, case.length
    x, B, C = (
        x.reshape(*at, c.mamba_num_heads, -1),
        B.reshape(*at, c.n_groups, -1),
        C.reshape(*at, c.n_groups, -1),
    )
    S = np.zeros((case.batch, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size))
    u, _ = readings.scan(case, x, dt, B, C, S)
    u = u.reshape(z.shape)
    normed = readings.gated_norm(case, u, z, c.layer_norm_epsilon)
    gated = (u * z / (1 + np.exp(-z))).reshape(*at, c.n_groups, -1)
    stretch = float(1 / np.sqrt((gated**2).mean(-1) + c.layer_norm_epsilon).min())
    size = c.hidden_size + case.length * c.ssm_state_size + c.mamba_inner
    agree(y, normed @ case.exact("out_proj.weight").T, backend.dtype, size, stretch=max(1.0, stretch))


@check("attention-mixer", drawing("*"), uses=("*",))
def the_attention_layer_is_what_the_equations_say(backend, case):
    """Check projections, attention and output of an attention layer, from an empty cache."""
    y, h = layer_of(backend, case)
    at = case.batch, case.length
    q, k, v = ((h @ case.exact(f"{x}_proj.weight").T).reshape(*at, -1, case.head_dim) for x in "qkv")
    expected = readings.attention(q, k, v).reshape(*at, -1) @ case.exact("o_proj.weight").T
    agree(y, expected, backend.dtype, case.hidden_size + attention_size(case) + q[0, 0].size)


@check("experts-mixer", drawing("E"), uses=("E",))
def the_experts_are_what_the_equation_says(backend, case):
    """Check relu^2 and no gate (trap 5), and which parts read the latent, and which full width (trap 6)."""
    y, h = layer_of(backend, case)
    for b, t in np.argwhere(lead(backend, case, h)):
        agree(
            y[b, t],
            readings.experts(case, h[b, t]),
            backend.dtype,
            experts_size(case),
            f"row {b}, position {t}",
        )


@check("experts-mixer", drawing("E"), uses=("E",))
def renaming_the_experts_changes_nothing(backend, case):
    """Check experts that change places in their group, and groups that change places."""
    cfg = case.cfg
    by_group = case.rng(5).permutation(np.arange(cfg.n_routed_experts).reshape(cfg.n_group, -1))
    order = case.rng(6).permuted(by_group, axis=1).reshape(-1)

    def read(name):
        head, experts, tail = name.partition(".experts.")
        if experts:
            e, matrix = tail.split(".", 1)
            return case.read(f"{head}.experts.{order[int(e)]}.{matrix}")
        return case.read(name)[order] if ".gate." in name else case.read(name)

    (y, h), (renamed, _) = layer_of(backend, case), layer_of(backend, case, read)
    sure = lead(backend, case, h)
    agree(renamed[sure], y[sure], backend.dtype, experts_size(case))


@check("mlp-mixer", drawing("-"), uses=("-",))
def the_dense_layer_is_one_expert_that_every_token_reads(backend, case):
    """Check the dense layer."""
    y, h = layer_of(backend, case)
    expected = readings.mlp(h, case.exact("up_proj.weight"), case.exact("down_proj.weight"))
    agree(y, expected, backend.dtype, case.hidden_size + case.cfg.intermediate_size)

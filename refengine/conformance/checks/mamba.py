"""Checks of the convolution and of the scan, against readings of their equations in float64."""

from __future__ import annotations

import math

import numpy as np

from refengine.conformance.cases import Case, agree, cut
from refengine.conformance.checks import check, drawing, expect, one_of, readings
from refengine.conformance.checks.readings import NO_LIMIT


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
    """Check that small steps count as they are, and that a limit in the config is obeyed (trap 1).

    So it is where softplus(dt) is dt: implementations have a branch for large ones.
    """
    x, dt, B, C, S = scan_inputs(backend, case)
    small, large = backend.exact(dt - 12), backend.exact(dt + 30)
    for dt_raw, bounds in ((dt, limit), (small, NO_LIMIT), (large, limit)):
        y, after = scanned(backend, case, x, dt_raw, B, C, earlier(backend, case, S), limit=bounds)
        scan_agrees(backend, case, y, backend.fetch(after), [x, dt_raw, B, C, S], bounds)


@check("ssd_scan", drawing(max_length=60, chunk_size=64), uses=("ssd_scan",))
def a_fast_decay_forgets_and_does_not_overflow(backend, case):
    """Check steps dt A of -1000: exp of the difference of two such sums is 0, never 0 times infinity."""
    x, dt, B, C, S = scan_inputs(backend, case)
    dt = backend.exact(dt + 200)
    y, after = scanned(backend, case, x, dt, B, C, earlier(backend, case, S))
    scan_agrees(backend, case, y, backend.fetch(after), [x, dt, B, C, S])

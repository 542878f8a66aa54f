"""The scan: the recurrence, the chunked theorem, and a reading of the equation that is neither."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import CUTS, Case, agree, cases, cut

SCANS = cases("M", max_length=40)
NO_LIMIT = (0.0, math.inf)


def drawn(case: Case):
    """x, dt, B, C, and a state S from before."""
    c, (b, t) = case.cfg, (case.batch, case.length)
    h, p, g, n = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
    shapes = (b, t, h, p), (b, t, h), (b, t, g, n), (b, t, g, n), (b, h, p, n)
    return [case.normal(i, *shape) for i, shape in enumerate(shapes)]


def scan(backend, case: Case, x, dt, B, C, S, n=None, limit=NO_LIMIT, piece=slice(None)):
    """`S` as the backend keeps it. Returns y on the host, and the next S."""
    w = backend.weights(case.cfg, case.read)
    x, dt, B, C = (backend.give(a[:, piece]) for a in (x, dt, B, C))
    n = None if n is None else backend.array(n)
    A, D, bias = w["A_log"], w["D"], w["dt_bias"]
    y, S = backend.ops.ssd_scan(x, dt, A, B, C, D, bias, S, n, limit, case.cfg.chunk_size)
    return backend.fetch(y), S


def read_off(case: Case, x, dt, B, C, S, limit=NO_LIMIT):
    """y[t] = sum_{s<=t} exp(dt[s+1..t] A) dt[s] (C[t].B[s]) x[s]  +  exp(dt[0..t] A) S C[t]  +  D x[t],

    where dt[s..t] is the sum of these steps, added up for each s anew: a difference of sums is less exact.
    """
    A, D, bias = -np.exp(case.exact("A_log")), case.exact("D"), case.exact("dt_bias")
    dt, y, after = np.clip(np.log1p(np.exp(dt + bias)), *limit), np.empty_like(x), np.empty_like(S)
    for b, h in np.ndindex(x.shape[0], x.shape[2]):
        g, steps = h // (x.shape[2] // B.shape[2]), dt[b, :, h]
        decay = np.eye(len(steps))  # t s
        for s in range(len(steps)):
            decay[s + 1 :, s] = np.exp(np.cumsum(steps[s + 1 :]) * A[h])
        since = np.exp(np.cumsum(steps) * A[h])[:, None]  # t 1
        mixed = decay * (C[b, :, g] @ B[b, :, g].T) * steps
        y[b, :, h] = mixed @ x[b, :, h] + since * (C[b, :, g] @ S[b, h].T) + D[h] * x[b, :, h]
        after[b, h] = since[-1] * S[b, h] + (decay[-1] * steps * x[b, :, h].T) @ B[b, :, g]
    return y, after


def check(backend, case: Case, y, after, arrays, limit=NO_LIMIT):
    """y, and the state after it; rounding is relative to how large they would be if nothing cancelled."""
    x, dt, B, C, S = arrays
    whole = read_off(case, abs(x), dt, abs(B), abs(C), abs(S), limit)
    expected = read_off(case, *arrays, limit)
    for what, mine, true, most in zip("yS", (y, after), expected, whole, strict=True):
        scale = max(1.0, most.max())
        agree(mine / scale, true / scale, backend.dtype, size(case), what)


def size(case: Case) -> int:
    """Products in one output: every position, times the state size."""
    return case.length * case.cfg.ssm_state_size


def before(backend, case: Case, S):
    """A state from before, as the backend keeps it."""
    return backend.state("M", case.cfg, case.batch, S=S).S


@given(case=SCANS)
def test_the_scan_is_what_the_equation_says(backend, case):
    *arrays, S = drawn(case)
    y, after = scan(backend, case, *arrays, before(backend, case, S))
    check(backend, case, y, backend.fetch(after), [*arrays, S])


@given(case=SCANS, cuts=CUTS)
def test_a_scan_in_pieces_is_the_scan(backend, case, cuts):
    """Any pieces, and within each any chunks: the drawn chunk_size need divide neither."""
    *arrays, first = drawn(case)
    S, pieces = before(backend, case, first), []
    for piece in cut(case, cuts):
        y, S = scan(backend, case, *arrays, S, piece=piece)
        pieces.append(y)
    check(backend, case, np.concatenate(pieces, axis=1), backend.fetch(S), [*arrays, first])


@given(case=SCANS)
def test_beyond_the_end_of_a_row_the_state_neither_decays_nor_grows(backend, case):
    *arrays, S = drawn(case)
    n = case.lengths
    padding = np.arange(case.length) >= n[:, None]
    garbage = [np.where(padding.reshape(padding.shape + (1,) * (a.ndim - 2)), 1e6, a) for a in arrays]
    y, after = scan(backend, case, *garbage, before(backend, case, S), n=n)
    after = backend.fetch(after)
    for row, end in enumerate(n):
        one = slice(row, row + 1)
        if end:
            check(backend, case, y[one, :end], after[one], [a[one, :end] for a in arrays] + [S[one]])
        else:
            assert np.array_equal(after[row], S[row])


@given(case=SCANS, limit=st.sampled_from(((0.01, 0.2), (0.0, 0.05), (0.5, math.inf))))
def test_dt_is_clamped_to_the_limit_and_to_nothing_else(backend, case, limit):
    """Trap 1: steps far below `time_step_min` count as they are; a limit in the config is obeyed."""
    x, dt, B, C, S = drawn(case)
    for dt_raw, bounds in ((dt, limit), (dt - 12, NO_LIMIT)):
        y, after = scan(backend, case, x, dt_raw, B, C, before(backend, case, S), limit=bounds)
        check(backend, case, y, backend.fetch(after), [x, dt_raw, B, C, S], bounds)


@given(case=cases("M", max_length=60, chunk_size=64))
def test_a_fast_decay_forgets_and_does_not_overflow(backend, case):
    """dt A of -1000 a step: exp of the difference of two such sums is 0, never 0 times infinity."""
    x, dt, B, C, S = drawn(case)
    y, after = scan(backend, case, x, dt + 200, B, C, before(backend, case, S))
    check(backend, case, y, backend.fetch(after), [x, dt + 200, B, C, S])

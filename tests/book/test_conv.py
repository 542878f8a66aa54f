"""The causal convolution: each channel is the sum over its last K values, then SiLU on all of x, B and C."""

import numpy as np
from hypothesis import given

from refengine.conformance.cases import CUTS, Case, agree, cases, cut

CONVS = cases("M")


def conv(backend, case: Case, x, tail, n=None):
    w = backend.weights(case.cfg, case.read)
    n = None if n is None else backend.array(n)
    return backend.ops.causal_conv(backend.give(x), w["conv1d.weight"], w["conv1d.bias"], tail, n)


def read_off(case: Case, x, tail):
    """y[t] = silu(bias + sum_j w[j] x[t-K+1+j]): w[K-1] meets the current token; before x comes `tail`."""
    w, bias, K = case.exact("conv1d.weight"), case.exact("conv1d.bias"), case.cfg.conv_kernel
    past = np.concatenate([tail, x], axis=1)
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        u = bias + sum(w[:, 0, K - 1 - ago] * past[:, K - 1 + t - ago] for ago in range(K))
        y[:, t] = u / (1 + np.exp(-u))
    return y, past[:, x.shape[1] :]


def drawn(case: Case):
    c = case.cfg
    return (
        case.normal(0, case.batch, case.length, c.conv_dim),
        case.normal(1, case.batch, c.conv_kernel - 1, c.conv_dim),
    )


@given(case=CONVS)
def test_the_last_tap_meets_the_current_token_and_silu_follows(backend, case):
    x, tail = drawn(case)
    y, after = conv(backend, case, x, backend.give(tail))
    expected, left = read_off(case, x, tail)
    agree(backend.fetch(y), expected, backend.dtype, case.cfg.conv_kernel, "y")
    assert np.array_equal(backend.fetch(after), left), "the tail is rows of x, before the activation"


@given(case=CONVS, cuts=CUTS)
def test_a_convolution_in_pieces_is_the_convolution(backend, case, cuts):
    """Pieces shorter than the kernel too: the tail then keeps some of its old rows."""
    x, tail = drawn(case)
    expected, left = read_off(case, x, tail)
    tail, pieces = backend.give(tail), []
    for piece in cut(case, cuts):
        y, tail = conv(backend, case, x[:, piece], tail)
        pieces.append(backend.fetch(y))
    agree(np.concatenate(pieces, axis=1), expected, backend.dtype, case.cfg.conv_kernel, "y")
    assert np.array_equal(backend.fetch(tail), left)


@given(case=CONVS)
def test_the_tail_of_a_row_ends_where_the_row_does(backend, case):
    x, tail = drawn(case)
    n = case.lengths
    x[np.arange(case.length) >= n[:, None]] = 1e6
    y, after = conv(backend, case, x, backend.give(tail), n)
    y, after = backend.fetch(y), backend.fetch(after)
    for row, end in enumerate(n):
        expected, left = read_off(case, x[row : row + 1, :end], tail[row : row + 1])
        agree(y[row, :end], expected[0], backend.dtype, case.cfg.conv_kernel, f"y of row {row}")
        assert np.array_equal(after[row], left[0]), f"the tail of row {row} holds padding"

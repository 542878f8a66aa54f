"""Convolution, scan and choice of experts over many positions, at odd sizes, against float64."""

import numpy as np
import pytest

from refengine.backends.cpu import native
from refengine.backends.cpu.verbs import Verbs
from refengine.conformance.cases import agree
from refengine.spec.conv import causal_conv
from refengine.spec.scan import ssd_scan

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
LENGTHS = [1, 2, 5, 33, 63, 64, 65, 200]


def verbs() -> Verbs:
    return Verbs(native.load(), 2)


def drawn(rng, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def wide(*arrays) -> list[np.ndarray]:
    return [a.astype(np.float64) for a in arrays]


def real_of(rng, b: int, l: int) -> np.ndarray | None:
    """Return lengths of rows, some shorter and one zero; None in half of the cases."""
    return np.array([l, 0, *rng.integers(0, l + 1, b - 2)]) if rng.random() < 0.5 else None


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize(("c", "k"), [(1, 2), (13, 4), (515, 3), (1030, 4)])
def test_conv(l, c, k):
    rng = np.random.default_rng([l, c, k])
    b = 3
    x, w, bias, tail = (
        drawn(rng, b, l, c + 5)[..., 2 : c + 2],
        drawn(rng, k, c),
        drawn(rng, c),
        drawn(rng, b, k - 1, c),
    )
    n = real_of(rng, b, l)
    y, after = verbs().causal_conv(x, w, bias, tail, n)
    expected, tail_after = causal_conv(*wide(x, w.T[:, None], bias, tail), n)
    for row in range(b):
        real = l if n is None else n[row]
        agree(y[row, :real], expected[row, :real], np.float32, k + 1)
    np.testing.assert_array_equal(after, tail_after.astype(np.float32))


@pytest.mark.parametrize("l", LENGTHS)
@pytest.mark.parametrize(("h", "p", "g", "s"), [(1, 1, 1, 1), (6, 7, 2, 5), (4, 64, 2, 33)])
def test_scan(l, h, p, g, s):
    rng = np.random.default_rng([l, h, p, g, s])
    b, chunk = 3, 40
    arrays = [
        drawn(rng, b, l, h, p), drawn(rng, b, l, h), np.log(rng.uniform(1, 16, h)).astype(np.float32),
        drawn(rng, b, l, g, s), drawn(rng, b, l, g, s), drawn(rng, h), drawn(rng, h), drawn(rng, b, h, p, s),
    ]  # fmt: skip
    n = real_of(rng, b, l)
    y, S = verbs().ssd_scan(*arrays, n, chunk=chunk)
    expected, S_after = ssd_scan(*wide(*arrays), n)
    for row in range(b):
        real = l if n is None else n[row]
        agree(y[row, :real], expected[row, :real], np.float32, 2 * l + s)
    agree(S, S_after, np.float32, 2 * l)


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (5, 1), (48, 1), (49, 7), (130, 1)])
def test_the_choice_of_experts_and_its_weights(count, groups):
    """Experts are chosen by sigmoid plus bias; their weights come from the sigmoid alone."""
    rng = np.random.default_rng([count, groups])
    rows, k = 70, min(count, 4)
    logits, bias = 6 * drawn(rng, rows, count), drawn(rng, count)
    logits[0] = 100 * np.sign(logits[0])
    logits[1], equal = 0, np.zeros_like(bias)
    expert, weight = np.empty((rows, k), np.int64), np.empty((rows, k), np.float32)
    v = verbs()

    def choose(bias):
        at = [a.__array_interface__["data"][0] for a in (logits, bias, expert, weight)]
        v.built.choose(at[0], at[1], rows, count, k, groups, groups, False, 2.5, at[2], at[3], v.how)

    choose(bias)
    (exact,) = wide(logits)
    score = 1 / (1 + np.exp(-exact))
    best = -np.sort(-(score + bias), axis=1)[:, :k]
    np.testing.assert_allclose(np.take_along_axis(score + bias, expert, 1), best, rtol=0, atol=1e-6)
    np.testing.assert_allclose(weight, 2.5 * np.take_along_axis(score, expert, 1), rtol=2e-6, atol=1e-37)
    assert not weight[0][exact[0][expert[0]] < 0].any()  # a sigmoid of -100 is 0
    logits[2] = np.nan
    choose(equal)
    assert expert[1].tolist() == list(range(k)) and np.isnan(weight[2]).all()

"""Products of few and many rows, at odd sizes, against float64, with each kind of weight."""

import numpy as np
import pytest

from refengine.backends.cpu import native
from refengine.backends.cpu.experts import Listed
from refengine.backends.cpu.verbs import Verbs
from refengine.backends.cpu.weights import NARROW
from refengine.spec.moe import Routing

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
KINDS = ["float32", *NARROW]
ROWS = [1, 2, 7, 8, 9, 47, 48, 49, 63, 64, 65, 72, 73, 79, 80, 127, 255, 256, 257, 300]


def verbs(threads: int = 2) -> Verbs:
    return Verbs(native.load(), threads)


def weights(rng, kind: str, *shape: int) -> np.ndarray:
    drawn = rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1])
    return drawn.astype(NARROW.get(kind, np.float32))


def wide(a) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outs", "n"), [(1, 1), (5, 3), (97, 337), (200, 700), (13, 1345)])
def test_linear(kind, outs, n):
    rng = np.random.default_rng([outs, n])
    w = weights(rng, kind, outs, n)
    for rows in ROWS:
        x = rng.standard_normal((rows, n)).astype(np.float32)
        near(verbs().linear(x, w), wide(x) @ wide(w).T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "d"), [(1, 1), (35, 61), (337, 130)])
def test_mlp(kind, width, d):
    rng = np.random.default_rng([width, d])
    up, down = weights(rng, kind, width, d), weights(rng, kind, d, width)
    for rows in ROWS:
        x = rng.standard_normal((rows, d)).astype(np.float32)
        near(verbs().mlp(x, up, down), np.maximum(wide(x) @ wide(up).T, 0) ** 2 @ wide(down).T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 40, 500])
def test_experts_that_many_and_few_tokens_choose(kind, tokens):
    """Every row chooses expert 0; few rows choose each other expert; two experts are on another rank."""
    rng = np.random.default_rng(tokens)
    d, width, count, first = 61, 35, 20, 2
    matrices = [(weights(rng, kind, width, d), weights(rng, kind, d, width)) for _ in range(count)]
    listed = Listed.of(*map(list, zip(*matrices, strict=True)))
    u = rng.standard_normal((tokens, d)).astype(np.float32)
    others = np.stack([rng.permutation(count + 1)[:2] + 1 for _ in range(tokens)])
    expert = np.concatenate([np.full((tokens, 1), first), np.where(others == first, 0, others)], axis=1)
    weight = rng.random(expert.shape).astype(np.float32)
    expected = np.zeros((tokens, d))
    for t in range(tokens):
        for e, share in zip(expert[t] - first, weight[t], strict=True):
            if 0 <= e < count:
                up, down = map(wide, matrices[e])
                expected[t] += share * (down @ np.maximum(up @ wide(u[t]), 0) ** 2)
    found = verbs().experts(u, listed, Routing(expert, weight), first)
    near(found, expected)
    np.testing.assert_array_equal(verbs(1).experts(u, listed, Routing(expert, weight), first), found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind):
    rng = np.random.default_rng(3)
    w, x = weights(rng, kind, 500, 700), rng.standard_normal((300, 700)).astype(np.float32)
    one = verbs(1).linear(x, w)
    for threads in (2, 5):
        np.testing.assert_array_equal(verbs(threads).linear(x, w), one)

"""Sampling against a literal reading: all options at once, in lists, in the order of the chapter."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import assume, example, given
from hypothesis import strategies as st

from refengine.conformance.checks.texts import AtABorder, filtered
from refengine.spec.sample import Sampling, draw, probabilities, sample
from tests.support.tries import tries

NEAR = 1e-9  # distance from a border within which float64 rounding decides


def agrees(logits, how: Sampling, seen) -> None:
    """Check the probabilities of the book against the literal reading."""
    expected, actual = filtered(logits, how, seen), probabilities(np.array(logits), how, seen)
    kept = {i for i, p in expected.items() if p > 0}
    assert set(np.flatnonzero(actual).tolist()) == kept, f"kept {np.flatnonzero(actual)}, not {sorted(kept)}"
    for i, p in expected.items():
        assert abs(actual[i] - p) <= 1e-12, f"token {i}: {actual[i]}, not {p}"


def log(*p: float) -> list[float]:
    return [math.log(x) for x in p]


# Two filters that do not commute, for each pair of neighbours; and a token seen long ago.
DECISIVE = {
    "the penalty comes before the temperature and top_k": (log(0.4, 0.35, 0.25), dict(top_k=1), [0]),
    "top_k comes before top_p": (log(0.4, 0.3, 0.2, 0.1), dict(top_k=2, top_p=0.55), []),
    "the temperature comes before top_p": (log(0.5, 0.3, 0.2), dict(temperature=3.0, top_p=0.45), []),
    "top_p comes before min_p": (log(0.5, 0.3, 0.2), dict(top_p=0.6, min_p=0.5), []),
    "the temperature comes before min_p": (log(0.7, 0.2, 0.1), dict(temperature=2.0, min_p=0.5), []),
    "a token seen long ago is penalised": ([1.0, 0.9, -1.0], dict(), [0, 2] + [1] * 300),
}
SHARP = dict(repetition_penalty=1.7)
CASES = [(logits, Sampling(**(SHARP | how)), seen) for logits, how, seen in DECISIVE.values()]


@st.composite
def drawn(draw_):
    """Draw logits, all five options at once, and a text that may be far longer than any window."""
    generator = np.random.default_rng(draw_(st.integers(0, 2**32)))
    size = draw_(st.integers(1, 40))
    logits = generator.normal(size=size) * draw_(st.sampled_from((0.3, 1.0, 4.0)))
    if draw_(st.booleans()):
        logits = np.round(2 * logits) / 2  # ties
    logits[generator.random(size) < draw_(st.sampled_from((0.0, 0.3)))] = -np.inf
    assume(np.isfinite(logits).any())
    how = Sampling(
        temperature=draw_(st.sampled_from((0.3, 0.7, 1.0, 1.7, 3.0)) | st.just(0)),
        top_k=draw_(st.integers(0, size + 2)),
        top_p=draw_(st.floats(0.05, 1.0) | st.just(1.0)),
        min_p=draw_(st.floats(0.0, 1.0) | st.just(0.0)),
        repetition_penalty=draw_(st.sampled_from((1.0, 0.6, 1.3, 2.5))),
    )
    seen = generator.integers(0, draw_(st.integers(1, size)), draw_(st.sampled_from((0, 3, 500)))).tolist()
    return logits.tolist(), how, seen


@tries(300, 100)
@given(case=drawn())
def test_all_options_together_mean_what_the_chapter_says(case):
    try:
        agrees(*case)
    except AtABorder:
        assume(False)


def test_the_options_are_applied_in_the_order_of_the_chapter():
    for case in CASES:
        agrees(*case)


@tries(100, 33)
@given(case=drawn(), seed=st.integers(0, 2**32))
@example(case=([0.0, 0.0], Sampling(), []), seed=0)
def test_the_token_is_where_one_uniform_number_falls_among_those_that_are_kept(case, seed):
    logits, how, seen = case
    try:
        p = filtered(*case)
    except AtABorder:
        assume(False)
    token = sample(np.array(logits), how, seen, np.random.default_rng(seed))
    u, below = np.random.default_rng(seed).random(), 0.0
    for i in sorted(p):
        if i == token:
            assert below <= u + NEAR and u < below + p[i] + NEAR
            return
        below += p[i]
    raise AssertionError(f"{token} is none of those that are kept")


class Fixed(np.random.Generator):
    """A random generator that returns a given uniform number next."""

    def __init__(self, u: float):
        super().__init__(np.random.Philox(0))
        self.u = u

    def random(self, *_):
        return self.u


@given(log2=st.integers(0, 4), data=st.data())
def test_a_border_belongs_to_what_follows_it(log2, data):
    """With equal tokens, a sum of exactly top_p is enough, and u at a border selects the next token."""
    size = 2**log2
    k = data.draw(st.integers(1, size))
    p = probabilities(np.zeros(size), Sampling(top_p=k / size), [])
    assert np.flatnonzero(p).tolist() == list(range(k))
    u = data.draw(st.integers(0, size - 1))
    whole = np.full(size, 1 / size)
    assert draw(whole, Fixed(u / size)) == u
    assert draw(np.append(0.0, whole), Fixed(0.0)) == 1, "no token without a chance"

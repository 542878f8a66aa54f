"""Each sampling filter keeps the right tokens, and tokens are drawn as often as their probabilities state."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refengine.spec.config import InputError
from refengine.spec.sample import Sampling, alternatives, draw, log_probs, probabilities, sample

PLAIN, seeds = Sampling(), st.integers(0, 2**32)
penalties = st.sampled_from((1.0, 1.3, 0.7))


@st.composite
def logits(draw, ties=True):
    """Draw numbers, possibly with many ties, and exclude some tokens."""
    generator = np.random.default_rng(draw(seeds))
    x = generator.normal(size=draw(st.integers(1, 40))) * draw(st.sampled_from((0.1, 1, 5)))
    x = np.round(2 * x) / 2 if ties and draw(st.booleans()) else x
    x[generator.random(x.size) < draw(st.sampled_from((0, 0.3)))] = -np.inf
    assume(np.isfinite(x).any())
    return x.astype(draw(st.sampled_from((np.float32, np.float64))))


@st.composite
def samplings(draw, **fixed):
    choices = dict(
        temperature=(0, 0.01, 0.7, 1.0, 3.0),
        top_k=(0, 1, 3, 50),
        top_p=(1e-9, 0.3, 0.9, 1.0),
        min_p=(0.0, 0.1, 1.0),
        repetition_penalty=(0.8, 1.0, 1.5),
    )
    return Sampling(**{name: draw(st.sampled_from(values)) for name, values in choices.items()} | fixed)


def likeliest_first(p):
    return np.argsort(-p, kind="stable")


@settings(max_examples=100)
@given(x=logits(), how=samplings(), data=st.data())
def test_any_filters_leave_probabilities_and_at_least_one_token(x, how, data):
    seen = data.draw(st.lists(st.integers(0, x.size - 1)))
    p = probabilities(x, how, seen)
    assert p.dtype == np.float64 and (p >= 0).all() and abs(p.sum() - 1) < 1e-12
    assert (p[np.isneginf(x)] == 0).all()


@given(x=logits(), seed=seeds)
def test_a_token_that_is_ruled_out_is_never_drawn(x, seed):
    p, generator = probabilities(x, PLAIN, []), np.random.default_rng(seed)
    assert all(np.isfinite(x[draw(p, generator)]) for _ in range(50))


@given(x=logits(), how=samplings(repetition_penalty=1.0), shift=st.floats(-50, 50))
def test_adding_a_number_to_all_logits_changes_nothing(x, how, shift):
    x = np.round(x.astype(np.float64) * 64) / 64  # so that the sums are exact
    shift = round(shift * 64) / 64
    assert np.array_equal(probabilities(x, how, []), probabilities(x + shift, how, []))


@given(x=logits(ties=False), temperature=st.sampled_from((0.3, 1.0, 2.0)))
def test_temperature_divides_the_differences(x, temperature):
    p = probabilities(x, Sampling(temperature=temperature), [])
    expected = np.exp(log_probs(x.astype(np.float64) / temperature))
    np.testing.assert_allclose(p, expected, rtol=1e-12)


@given(x=logits(), k=st.integers(1, 45))
def test_top_k_keeps_the_k_likeliest_and_of_equal_ones_the_lower_ids(x, k):
    kept = np.flatnonzero(probabilities(x, Sampling(top_k=k), []))
    assert sorted([i for i in likeliest_first(x) if np.isfinite(x[i])][:k]) == kept.tolist()


@settings(max_examples=100)
@given(x=logits(), top_p=st.floats(0.001, 0.999))
def test_top_p_keeps_the_fewest_tokens_that_reach_it(x, top_p):
    p = probabilities(x, PLAIN, [])
    kept = np.flatnonzero(probabilities(x, Sampling(top_p=top_p), []))
    order = likeliest_first(p)[: kept.size]
    assert sorted(order) == kept.tolist(), "the likeliest ones"
    assert p[order].sum() >= top_p - 1e-12, "reach it"
    assert p[order[:-1]].sum() < top_p + 1e-12, "and one fewer would not"


@given(x=logits(), min_p=st.floats(0.01, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(x, min_p):
    p = probabilities(x, PLAIN, [])
    assert np.array_equal(probabilities(x, Sampling(min_p=min_p), []) > 0, p >= min_p * p.max())


@given(x=logits(), seed=seeds, data=st.data())
def test_top_k_of_one_and_the_strictest_top_p_are_greedy(x, seed, data):
    seen, penalty = data.draw(st.lists(st.integers(0, x.size - 1))), data.draw(penalties)
    generator = np.random.default_rng(seed)
    greedy = sample(x, Sampling(temperature=0, repetition_penalty=penalty), seen, generator)
    for how in {"top_k": 1}, {"top_p": 1e-9}:
        assert sample(x, Sampling(repetition_penalty=penalty, **how), seen, generator) == greedy


@given(x=logits())
def test_greedy_takes_the_lowest_of_the_largest_and_no_random_number(x):
    assert sample(x, Sampling(temperature=0), [], None) == min(np.flatnonzero(x == x.max()))
    assert draw(probabilities(x, Sampling(temperature=0), []), np.random.default_rng(0)) == np.argmax(x)


@given(x=logits(), penalty=penalties, data=st.data())
def test_a_seen_token_is_penalised_once_and_no_other(x, penalty, data):
    seen = data.draw(st.lists(st.integers(0, x.size - 1)))
    factor = np.where(x > 0, 1 / penalty, penalty)
    expected = [value * factor[i] if i in seen else value for i, value in enumerate(x.astype(float))]
    p = probabilities(x, Sampling(repetition_penalty=penalty), seen)
    np.testing.assert_allclose(p, np.exp(log_probs(np.array(expected))), rtol=1e-12)


@given(x=logits(), how=samplings(), seed=seeds)
def test_one_uniform_number_chooses_where_the_sum_of_probabilities_exceeds_it(x, how, seed):
    p, u = probabilities(x, how, []), np.random.default_rng(seed).random()
    token = draw(p, np.random.default_rng(seed))
    assert p[:token].sum() <= u + 1e-12 and p[: token + 1].sum() > u - 1e-12 and p[token] > 0


def test_tokens_come_as_often_as_the_probabilities_say():
    p = probabilities(np.array([0.0, 1.0, -1.0, 2.0, 0.5, -np.inf]), Sampling(temperature=0.8), [])
    generator, n = np.random.Generator(np.random.Philox(5)), 20000
    counts = np.bincount([draw(p, generator) for _ in range(n)], minlength=p.size)
    chi_square = ((counts - n * p)[:-1] ** 2 / (n * p)[:-1]).sum()
    assert counts[-1] == 0 and chi_square < 18.5  # 4 degrees of freedom: exceeded once in 1000


@given(x=logits(), n=st.integers(0, 45))
def test_log_probabilities_are_of_the_unfiltered_logits_and_the_likeliest_come_first(x, n):
    log_p = log_probs(x)
    assert abs(np.exp(log_p).sum() - 1) < 1e-12
    possible = np.isfinite(x)
    np.testing.assert_allclose(np.diff(log_p[possible]), np.diff(x[possible].astype(float)), atol=1e-9)
    assert np.array_equal(log_probs(np.stack([x, x + 1]))[0], log_p)
    assert alternatives(log_p, n) == [(i, log_p[i]) for i in likeliest_first(x) if possible[i]][:n]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_an_option_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("x", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_that_say_nothing_are_refused(x):
    with pytest.raises(InputError, match="damaged"):
        probabilities(np.array(x), PLAIN, [])

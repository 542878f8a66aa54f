"""Sampled text with drafts has the distribution of plain text: tested by enumeration of all texts."""

import math
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

from refengine.conformance.mistakes.speculation import always, by_q_over_p, from_p
from refengine.conformance.truth import model
from refengine.generation import Drawing
from refengine.runner import How, LocalRunner, Part
from refengine.spec import sample
from refengine.spec.ops import numpy_backend
from refengine.spec.sample import Sampling, probabilities
from refengine.speculation import acceptance
from refengine.speculation.acceptance import Guess, accepted
from tests.support.layouts import Cuttable

CASE = Cuttable(layers="-", mtp_layers="*E", seed=3, batch=1, widths=(13, 17, 31, 5))  # 5 tokens
FILTERS = Sampling(temperature=1.3, top_k=4, top_p=0.97, min_p=0.02, repetition_penalty=1.3)
PROMPT, TOKENS, SLOTS = [2, 4, 2], 3, 64


@lru_cache
def exact() -> dict[tuple, float]:
    """Return the probability of each text of TOKENS tokens after the prompt."""
    runner = LocalRunner(model(CASE, numpy_backend(np.float64)))
    texts = {(): 1.0}
    for _ in range(TOKENS):
        longer = {}
        for text, share in texts.items():
            seen = [*PROMPT, *text]
            p = probabilities(runner.logits(seen)[-1], FILTERS, seen)
            longer |= {(*text, int(token)): share * p[token] for token in np.flatnonzero(p)}
        texts = longer
    return texts


def drawn(batches: int, seed: int = 0) -> Counter:
    """Return the frequency of each text with drafts of two tokens a call."""
    runner, texts = LocalRunner(model(CASE, numpy_backend(np.float64))), Counter()
    slots = list(range(SLOTS))
    for batch in range(batches):
        how = [How(FILTERS, seed + batch * SLOTS + slot, drafts=True) for slot in slots]
        runner.read([Part(slot, PROMPT, how[slot], True) for slot in slots])
        while short := [slot for slot in slots if len(written(runner, slot)) < TOKENS]:
            latest = [runner.drawings[slot].ids[-1] for slot in short]
            runs = runner.speculate(short, latest, [2] * len(short))
            runner.keep(short, [len(run.draws) for run in runs])
        texts.update(tuple(written(runner, slot)[:TOKENS]) for slot in slots)
        runner.drop(slots)
    return texts


def written(runner, slot: int) -> list[int]:
    return runner.drawings[slot].ids[len(PROMPT) :]


def surprise(texts: Counter) -> float:
    """Return by how many standard deviations the chi-square statistic of the texts exceeds its mean."""
    total, expected = sum(texts.values()), exact()
    assert set(texts) <= set(expected), "a text that the filters rule out"
    frequent = [text for text, p in expected.items() if p * total >= 5]
    cells = [(texts[text], expected[text] * total) for text in frequent]
    rest = total - sum(count for count, _ in cells), total - sum(due for _, due in cells)
    cells += [rest] if rest[1] > 1e-9 else []
    statistic = sum((count - due) ** 2 / due for count, due in cells)
    return (statistic - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


@pytest.mark.slow
def test_sampled_text_has_the_distribution_of_text_without_drafts(record_property):
    worst = surprise(drawn(14))
    record_property("worst surprise of sampled texts (limit 3)", float(worst))
    assert worst < 3


def equal(ids, p, draft, generator):
    """Accept a draft if the trunk draws it with a separate number: too rarely, but correct."""
    return int(ids[sample.draw(p, generator)]), 1


@pytest.mark.parametrize("rule", [always, by_q_over_p, from_p])
def test_a_wrong_rule_of_acceptance_goes_red(rule, monkeypatch):
    monkeypatch.setattr(acceptance, "verified", rule)
    try:
        assert surprise(drawn(6)) > 6
    except AssertionError as error:
        assert "rule out" in str(error)


def test_another_right_rule_stays_green(monkeypatch):
    monkeypatch.setattr(acceptance, "verified", equal)
    assert surprise(drawn(6)) < 3


def test_filters_of_the_head_without_those_of_the_trunk_go_red(monkeypatch):
    """Without its filters, the trunk admits texts that they exclude."""
    unfiltered = lambda logits, how, seen: sample.likely(logits, Sampling(), seen)  # noqa: E731
    monkeypatch.setattr(acceptance, "likely", unfiltered)
    with pytest.raises(AssertionError):
        assert surprise(drawn(1)) < 3


def test_at_temperature_0_no_random_number_is_taken():
    drawing, rng = Drawing(Sampling(temperature=0), 1), np.random.default_rng(0)
    logits = rng.normal(size=(3, 9))
    best = logits.argmax(axis=1)
    guesses = [Guess(int(token), np.array([]), np.array([])) for token in best[:2]]
    draws, used = accepted(drawing, logits, guesses)
    assert [draw.id for draw in draws] == best.tolist() and used == 0
    assert drawing.generator.random() == Drawing(Sampling(temperature=0), 1).generator.random()

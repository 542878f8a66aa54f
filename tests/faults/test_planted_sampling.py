"""Each planted fault in the order and the range of the sampling filters fails the literal reading."""

import numpy as np
import pytest

from refengine.spec import sample
from refengine.spec.sample import likeliest, nucleus, penalised
from tests.book import test_sampling_order
from tests.book.test_sampling_order import CASES, agrees


def softmax(logits, temperature):
    p = np.exp((logits - logits.max()) / temperature)
    return p / p.sum()


def keep(ids, p, kept):
    return ids[kept], p[kept] / p[kept].sum()


def min_p_before_top_p(logits, how, seen):
    logits = penalised(logits, how.repetition_penalty, seen)
    ids = likeliest(logits, how.top_k)
    p = softmax(logits[ids], how.temperature)
    ids, p = keep(ids, p, p >= how.min_p * p.max())
    return keep(ids, p, nucleus(p, how.top_p))


def top_p_before_temperature(logits, how, seen):
    logits = penalised(logits, how.repetition_penalty, seen)
    ids = likeliest(logits, how.top_k)
    kept = nucleus(softmax(logits[ids], 1.0), how.top_p)
    ids, p = keep(ids, softmax(logits[ids], how.temperature), kept)
    return keep(ids, p, p >= how.min_p * p.max())


def top_k_after_top_p(logits, how, seen):
    logits = penalised(logits, how.repetition_penalty, seen)
    ids, p = keep(np.arange(logits.size), softmax(logits, how.temperature), slice(None))
    ids, p = keep(ids, p, nucleus(p, how.top_p))
    ids, p = keep(ids, p, likeliest(p, how.top_k))
    return keep(ids, p, p >= how.min_p * p.max())


def min_p_before_temperature(logits, how, seen):
    logits = penalised(logits, how.repetition_penalty, seen)
    ids = likeliest(logits, how.top_k)
    plain = softmax(logits[ids], 1.0)
    ids, p = keep(ids, softmax(logits[ids], how.temperature), plain >= how.min_p * plain.max())
    return keep(ids, p, nucleus(p, how.top_p))


def penalty_after_top_k(logits, how, seen):
    ids = likeliest(logits.astype(np.float64), how.top_k)
    logits = penalised(logits, how.repetition_penalty, seen)
    return keep(ids, softmax(logits[ids], how.temperature), slice(None))


def penalty_within_a_window(logits, how, seen):
    logits = penalised(logits, how.repetition_penalty, seen[-64:])
    return keep(np.arange(logits.size), softmax(logits, how.temperature), slice(None))


def penalty_without_the_last(logits, how, seen):
    logits = penalised(logits, how.repetition_penalty, seen[:-1])
    return keep(np.arange(logits.size), softmax(logits, how.temperature), slice(None))


FAULTS = [
    min_p_before_top_p,
    top_p_before_temperature,
    top_k_after_top_p,
    min_p_before_temperature,
    penalty_after_top_k,
    penalty_within_a_window,
    penalty_without_the_last,
]


def goes_red() -> bool:
    for case in CASES:
        try:
            agrees(*case)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_order_or_reach_goes_red(fault, monkeypatch):
    assert not goes_red()
    monkeypatch.setattr(sample, "likely", fault)
    assert goes_red()


def test_a_nucleus_that_keeps_one_more_goes_red(monkeypatch):
    def one_more(p, top_p):
        order = np.argsort(-p, kind="stable")
        return np.sort(order[np.cumsum(p[order]) - p[order] <= top_p])

    check = test_sampling_order.test_a_border_belongs_to_what_follows_it
    check()
    monkeypatch.setattr(sample, "nucleus", one_more)
    with pytest.raises(AssertionError):
        check()

"""Decide which drafts are kept, by the rule that leaves the distribution of the text unchanged.

A draft x was drawn from q, the head's probabilities; p are the trunk's, after the same filters and penalties.

    accept x with probability min(1, p(x) / q(x));   else draw from max(p - q, 0), normalised

A token comes out with probability min(p, q) + (1 - sum min(p, q)) max(p - q, 0) / sum max(p - q, 0) = p.
The first draft that is not accepted ends the run; after the last one another token is drawn from p. At
temperature 0 both p and q have one token, and the rule is equality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from refengine.generation import Draw, Drawing
from refengine.spec.sample import Sampling, draw, likely, sample


class Guess(NamedTuple):
    """A draft, and the distribution that it was drawn from; at temperature 0 the distribution is empty."""

    token: int
    ids: np.ndarray
    q: np.ndarray


class Run(NamedTuple):
    """The tokens that a sequence drew in one call: drafts that were accepted, then one more."""

    draws: list[Draw]
    drafts: int  # how many there were
    rows: int = 0  # that the head read before them

    @property
    def accepted(self) -> int:
        """Return how many drafts were accepted."""
        return len(self.draws) - 1


def guess(logits: np.ndarray, sampling: Sampling, seen: Sequence[int], generator) -> Guess:
    """Return a draft by the head's logits [v], chosen as the trunk chooses."""
    if sampling.temperature == 0:
        nothing = np.array([], np.int64)
        return Guess(sample(logits, sampling, seen, generator), nothing, nothing)
    ids, q = likely(logits, sampling, seen)
    return Guess(int(ids[draw(q, generator)]), ids, q)


def accepted(drawing: Drawing, logits: np.ndarray, guesses: list[Guess]) -> tuple[list[Draw], int]:
    """Return the draws of a run by logits [drafts + 1, v], and how many random numbers they took.

    The drawing's tokens are not changed, its generator moves on.
    """
    draws: list[Draw] = []
    seen, used = list(drawing.ids), 0
    for row, draft in zip(logits, [*guesses, None], strict=True):
        if drawing.sampling.temperature == 0:
            token = sample(row, drawing.sampling, seen, drawing.generator)
        elif draft is None:
            token, used = sample(row, drawing.sampling, seen, drawing.generator), used + 1
        else:
            token, took = verified(*likely(row, drawing.sampling, seen), draft, drawing.generator)
            used += took
        draws.append(drawing.draw_of(token, row))
        seen.append(token)
        if draft is None or token != draft.token:
            break
    return draws, used


def verified(ids: np.ndarray, p: np.ndarray, draft: Guess, generator) -> tuple[int, int]:
    """Return the draft or the token in its place, and how many random numbers that took.

    ids, p: the tokens that the trunk's filters leave, in order, and their probabilities.
    """
    p_of_draft, q_of_draft = of(ids, p, draft.token), of(draft.ids, draft.q, draft.token)
    if generator.random() * q_of_draft < p_of_draft:
        return draft.token, 1
    rest = np.maximum(p - spread(draft.ids, draft.q, ids), 0)
    return int(ids[draw(rest if rest.sum() > 0 else p, generator)]), 2


def accept(p: np.ndarray, q: np.ndarray, draft: int, generator) -> int:
    """Return the draft or the token in its place, by the probabilities [v] of trunk and head."""
    ids, drafted = np.flatnonzero(p), np.flatnonzero(q)
    return verified(ids, p[ids], Guess(draft, drafted, q[drafted]), generator)[0]


def of(ids: np.ndarray, p: np.ndarray, token: int) -> float:
    """Return the probability of a token among ids in order; 0 if it is not one of them."""
    at = int(np.searchsorted(ids, token))
    return float(p[at]) if at < len(ids) and ids[at] == token else 0.0


def spread(ids: np.ndarray, q: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Return the probabilities q of ids at the tokens `over`; both in order."""
    if not len(ids):
        return np.zeros(len(over))
    at = np.minimum(np.searchsorted(ids, over), len(ids) - 1)
    return np.where(ids[at] == over, q[at], 0.0)

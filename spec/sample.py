"""Chapter 16. Sampling: the choice of one token by the logits of all tokens.

    v   vocabulary          logits [v]   any numbers; only their differences count
    p   probabilities [v]   seen         ids that stand in the text so far, the prompt included

Logits pass five filters, in this order; in brackets the value with which a filter does nothing:

    (1) repetition_penalty r   a seen token's logit becomes logit / r if it is positive, logit r if it is not
    (1) temperature T          p = softmax(logits / T); as T falls to 0 the largest takes all: greedy
    (0) top_k k                only the k likeliest
    (1) top_p P                the smallest set of the likeliest tokens left whose p sum to P or more
    (0) min_p m                only those at least m times as likely as the likeliest

Of two equal tokens the one with the lower id counts as likelier. Then a uniform number u chooses the first
token, in order of id, at which the sum of p exceeds u: the same logits and seed give the same token. The
log-probabilities shown to users are of the logits before any filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refengine.spec.arrays import Array, Float
from refengine.spec.config import InputError
from refengine.spec.keys import shown


@dataclass(frozen=True)
class Sampling:
    """Options of the choice of a token; the defaults filter nothing."""

    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0

    def __post_init__(self):
        for name, allowed, holds in (
            ("temperature", "a number from 0 to 1e30", lambda t: 0 <= t < 1e30),
            ("top_k", "a whole number from 0 (all tokens) on", lambda k: k >= 0 and k == int(k)),
            ("top_p", "above 0 and at most 1", lambda p: 0 < p <= 1),
            ("min_p", "between 0 and 1", lambda p: 0 <= p <= 1),
            ("repetition_penalty", "a number above 0 and below 1e30", lambda r: 0 < r < 1e30),
        ):
            value = getattr(self, name)
            if type(value) not in (int, float) or not holds(value):
                raise InputError(f"{name} = {shown(value)} is out of range: it has to be {allowed}")


def sample(logits: Float[Array, " v"], sampling: Sampling, seen: Sequence[int], generator) -> int:
    """Return the id of one token. Greedy choice takes no number from the generator."""
    if sampling.temperature == 0:
        return int(penalised(logits, sampling.repetition_penalty, seen).argmax())
    ids, p = likely(logits, sampling, seen)
    return int(ids[draw(p, generator)])


def probabilities(logits: Float[Array, " v"], sampling: Sampling, seen: Sequence[int]) -> Float[Array, " v"]:
    """Return the probability of every token after the filters, [v] float64."""
    p = np.zeros(logits.size)
    if sampling.temperature == 0:
        p[np.argmax(penalised(logits, sampling.repetition_penalty, seen))] = 1
    else:
        ids, p_of_ids = likely(logits, sampling, seen)
        p[ids] = p_of_ids
    return p


def likely(logits: Float[Array, " v"], sampling: Sampling, seen: Sequence[int]) -> tuple[Array, Array]:
    """Return the ids that no filter rules out, in order, and their probabilities."""
    logits = penalised(logits, sampling.repetition_penalty, seen)  # float64 from here on
    ids = likeliest(logits, int(sampling.top_k))
    logits = logits[ids]
    with np.errstate(over="ignore"):  # at a temperature close to 0
        p = np.exp((logits - logits.max()) / sampling.temperature)
    kept = nucleus(p / p.sum(), sampling.top_p)
    ids, p = ids[kept], p[kept]
    kept = p >= sampling.min_p * p.max()
    ids, p = ids[kept], p[kept]
    return ids, p / p.sum()


def checked(logits):
    """Return the logits; InputError if they cannot be chosen from."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise InputError("the logits hold NaN or infinity, or rule out every token: the weights are damaged")
    return logits


def penalised(logits, penalty: float, seen: Sequence[int]):
    """Return the logits after the repetition penalty, in float64."""
    logits = checked(logits).astype(np.float64)
    if penalty != 1:
        once = np.unique(np.asarray(seen, np.int64))  # however often it was seen, a token is penalised once
        logits[once] = np.where(logits[once] > 0, logits[once] / penalty, logits[once] * penalty)
    return logits


def likeliest(logits, k: int):
    """Return the indices of the k largest (0: of all), in order."""
    if not 0 < k < logits.size:
        return np.arange(logits.size)
    kth = np.partition(logits, -k)[-k]
    above = np.flatnonzero(logits > kth)
    equal = np.flatnonzero(logits == kth)[: k - above.size]
    return np.sort(np.concatenate([above, equal]))


def nucleus(p, top_p: float):
    """Return the indices of the fewest that reach top_p, in order; at least one."""
    if top_p == 1:
        return slice(None)
    candidates = np.flatnonzero(p >= (1 - top_p) / p.size)  # the others fall short of 1 - top_p all together
    order = candidates[np.argsort(-p[candidates], kind="stable")]
    likelier = np.cumsum(p[order]) - p[order]
    return np.sort(order[likelier < top_p])


def draw(p: Float[Array, " v"], generator: np.random.Generator) -> int:
    """Return the first index at which the sum of p exceeds a uniform random number."""
    total = np.cumsum(p)
    return int(np.searchsorted(total, generator.random() * total[-1], side="right"))


def log_probs(logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    """Return ln softmax(logits), in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def alternatives(log_p: Float[Array, " v"], n: int) -> list[tuple[int, float]]:
    """Return the n likeliest tokens with their log-probabilities, likeliest first."""
    best = likeliest(log_p, n) if n else np.array([], int)
    best = best[log_p[best] > -np.inf]
    return [(int(i), float(log_p[i])) for i in best[np.argsort(-log_p[best], kind="stable")]]

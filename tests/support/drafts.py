"""Replace the head's drafts by drafts of which a known share is right; the head still runs."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np

from refengine.speculation.acceptance import Guess, guess


def oracle(texts: dict[tuple[int, ...], list[int]], rate: float, seed: int = 0):
    """Return a patch: each draft is the next token of its text with probability `rate`, else another one.

    texts: by prompt, the tokens that follow it.
    """
    rng = np.random.default_rng(seed)

    def right(logits, sampling, seen, generator) -> Guess:
        made = guess(logits, sampling, seen, generator)
        prompt = next((prompt for prompt in texts if tuple(seen[: len(prompt)]) == prompt), ())
        rest = texts.get(prompt, [])[len(seen) - len(prompt) :]
        token = rest[0] if rest else 0
        if rng.random() >= rate:
            token = (token + 1) % len(logits)
        return made._replace(token=token)

    return mock.patch("refengine.speculation.drafting.guess", right)


def calls_of(runner) -> Callable[[], int]:
    """Return a function that returns the number of a runner's calls with drafts from now on."""
    count, right = [0], runner.speculate

    def speculate(*args):
        count[0] += 1
        return right(*args)

    runner.speculate = speculate
    return lambda: count[0]

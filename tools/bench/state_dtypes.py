"""Measure what the dtypes that states are stored in cost in quality, on the embedded model.

    python -m tools.bench.state_dtypes [--model tiny] [--tokens 4000] [--texts 64]

Each row decodes the same text a token at a time, as generation does, in float32 but for what is stored: the
mean loss, the mean Kullback-Leibler divergence from the first row, how often the likeliest token is another,
and the mean length of texts sampled with the same seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from refengine.backends.cpu import cpu_backend
from refengine.backends.cpu.state import Rows
from refengine.checkpoint import Checkpoint
from refengine.quantize.texts import TEXTS
from refengine.spec.model import Model
from refengine.spec.sample import Sampling, log_probs, sample
from refengine.spec.state import keyed
from refengine.text.ids_only import tokenizer_of

SAMPLED = Sampling(temperature=1.0)


def nearest(states: list) -> list:
    """Return states whose S is rounded to the nearest float16."""

    def rounded(S: Rows) -> Rows:
        return Rows(S.array.astype(np.float16).astype(np.float32))

    return [replace(s, S=rounded(s.S)) if hasattr(s, "S") else s for s in states]


def same(states: list) -> list:
    """Return the states."""
    return states


ROWS: dict[str, tuple[dict, Callable]] = {
    "float32": ({}, same),
    "S in float16, to nearest": ({}, nearest),
    "S in float16, at random": ({"ssm": "float16"}, same),
    "keys and values in bfloat16": ({"kv": "bfloat16"}, same),
    "keys and values in FP8": ({"kv": "fp8"}, same),
    "FP8, and S in float16 at random": ({"kv": "fp8", "ssm": "float16"}, same),
}


def told(model: Model, ids: list[int], after: Callable, seed: int) -> np.ndarray:
    """Return log-probabilities [tokens v], a token at a time."""
    states, found = keyed(model.new_states(1), [seed]), []
    for token in ids:
        logits, states = model.backend.step(model, [token], states)
        states = after(states)
        found.append(log_probs(logits[0]))
    return np.array(found)


def lengths(
    model: Model, start: list[int], ends: frozenset[int], after: Callable, count: int, most: int
) -> np.ndarray:
    """Return the lengths of `count` sampled texts, each with a seed of its own."""
    states = keyed(model.new_states(count), range(count))
    drawing = [np.random.Generator(np.random.Philox(i)) for i in range(count)]
    latest, found = [start[0]] * count, np.full(count, most)
    for at in range(most + len(start) - 1):
        logits, states = model.backend.step(model, latest, states)
        states = after(states)
        if at + 1 < len(start):
            latest = [start[at + 1]] * count
            continue
        latest = [sample(row, SAMPLED, [], rng) for row, rng in zip(logits, drawing, strict=True)]
        for i, token in enumerate(latest):
            if token in ends:
                found[i] = min(found[i], at + 2 - len(start))
        if (found < most).all():
            break
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--most", type=int, default=600, help="longest text")
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    tokenizer = tokenizer_of(checkpoint.directory, checkpoint.config)
    stories = [tokenizer.encode(text) + sorted(tokenizer.stop_ids)[:1] for text in TEXTS]
    ids = [
        token
        for _ in range(1 + arguments.tokens // sum(map(len, stories)))
        for story in stories
        for token in story
    ]
    ids, following = ids[: arguments.tokens], np.array(ids[1 : arguments.tokens + 1])
    start, ends = tokenizer.encode("Once upon a time"), tokenizer.stop_ids
    exact = None
    print("| stored | loss | KL | other likeliest | mean length of a text |\n|---|---|---|---|---|")
    for name, (kept, after) in ROWS.items():
        model = Model.build(
            checkpoint.config, checkpoint.read, cpu_backend("float32", 2, **({"kv": "float32"} | kept))
        )
        found = told(model, ids, after, seed=1)
        exact = found if exact is None else exact
        loss = -found[np.arange(len(ids)), following].mean()
        divergence = (np.exp(exact) * (exact - found)).sum(axis=1).mean()
        other = (found.argmax(axis=1) != exact.argmax(axis=1)).mean()
        long = lengths(model, start, ends, after, arguments.texts, arguments.most)
        error = long.std() / len(long) ** 0.5
        print(
            f"| {name} | {loss:.5f} | {divergence:.2e} | {other:.2%} | {long.mean():.1f} +- {error:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

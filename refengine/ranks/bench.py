"""refengine bench on several ranks: every one makes the same calls, and what is measured is the whole job.

A call ends when all ranks know that the last stage has the logits, as in a text each token does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import numpy as np

from refengine.bench import decode_row, filled, prefill_row, seconds
from refengine.machine import peak_memory
from refengine.ranks.engine import RankEngine


def bench(
    engine: RankEngine, prompts: list[int], batches: list[int], contexts: list[int], repeat: int, steps: int
) -> Iterator[dict]:
    """A row a measurement, as refengine.bench gives them; its memory is that of the rank that took most."""
    rng = np.random.default_rng(0)

    def read(rows: list[list[int]]) -> None:
        engine.prefill(rows)
        engine.barrier()

    for length in prompts:
        rows = rng.integers(0, engine.config.vocab_size, (1, length)).tolist()
        took = seconds(lambda rows=rows: read(rows), repeat)
        yield prefill_row(length, took, None, round(engine.largest(peak_memory())))
    for context in contexts:
        for batch in batches:
            took = decode_seconds(engine, batch, context, steps)
            yield decode_row(batch, context, took, None, round(engine.largest(peak_memory())))


def decode_seconds(engine: RankEngine, batch: int, context: int, steps: int) -> float:
    """The median time of one step."""
    rng, times = np.random.default_rng(1), []
    states = with_context(engine, batch, context)
    engine.barrier()
    for _ in range(steps + 2):
        began = time.perf_counter()
        ids = rng.integers(0, engine.config.vocab_size, batch)
        _, states = engine.decode(ids.tolist(), states)
        engine.barrier()
        times.append(time.perf_counter() - began)
    return median(times[2:])


def with_context(engine: RankEngine, batch: int, context: int) -> list:
    """States of this rank's sequences that have read `context` positions of noise."""
    logits, _ = engine.prefill([[0]] * batch)  # of this rank's sequences, or of as many
    first = np.zeros((len(logits), 1), np.int64)
    h, states = engine.step(first, engine.new_states(len(first)))
    dtype = engine.plain.fetch(h).dtype
    return filled(states, engine.plain, engine.config, len(first), context, dtype)

"""Measure saved states and snapshots of prefixes on a checkpoint of any size.

    python -m tools.bench.states MODEL [--tokens 16384] [--backend cpu] [--dtype bfloat16]

Prints the time of reading a prompt without a cache and with a snapshot after every call, the time of saving
the state and of going on from its file, and the time of the same prompt with a new end, which starts from a
snapshot. Times are of all processors together, so that other work beside it counts less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import refengine
from refengine.states.state import State
from refengine.units import bytes_text


def timed(work) -> tuple[float, object]:
    """Return the seconds of all processors that work() takes, and what it returns."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def first_token(engine, prompt, **how):
    """Return the End of a text of one token."""
    *_, end = engine.generate(prompt, max_tokens=1, temperature=0, ignore_eos=True, **how)
    return end


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    engine = refengine.load(asked.model, asked.backend, asked.dtype)
    rng = np.random.default_rng(0)
    first_token(engine, rng.integers(20, engine.config.vocab_size, 600).tolist())
    prefixes, state = engine.loop.prefixes, None
    for _ in range(asked.rounds):
        ids = rng.integers(20, engine.config.vocab_size, asked.tokens).tolist()
        prefixes.budget = 0
        plain, _ = timed(lambda ids=ids: first_token(engine, ids))
        prefixes.budget = 2**40
        kept, _ = timed(lambda ids=ids: first_token(engine, ids))
        points = len(prefixes.points)
        print(f"{asked.tokens} tokens: read in {plain:.2f} s, with {points} points in {kept:.2f} s", end="")
        print(f" ({kept / plain - 1:+.1%}); {bytes_text(prefixes.total)} are kept")
        new, end = timed(lambda ids=ids: first_token(engine, [*ids, 5, 6, 7]))
        print(f"three tokens more: {new:.3f} s ({new / plain:.2%}), {end.statistics['reused_tokens']} reused")
        state = first_token(engine, [*ids, 5, 6, 7, 8], keep="end").state
        prefixes.budget = 0
        prefixes.shrink()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        saving, _ = timed(lambda: state.save(path))
        loading, found = timed(lambda: State.load(path))
        going, _ = timed(lambda: first_token(engine, [5], state=found))
        size = path.stat().st_size
    print(f"state: {bytes_text(size)}, saved in {saving:.3f} s, loaded in {loading:.3f} s", end="")
    print(f", the next token in {going:.3f} s: {(loading + going) / plain:.2%} of reading it again")


if __name__ == "__main__":
    main()

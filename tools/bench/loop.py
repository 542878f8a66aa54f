"""Measure the loop: many prompts of very different lengths through few slots.

    python -m tools.bench.loop MODEL [--slots 8,32] [--prompts 200] [--backend torch --dtype bfloat16]
    python -m tools.bench.loop tiny --trace      who is in which slot, turn by turn, for 20 prompts
    python -m tools.bench.loop tiny --cost       processor time of the loop, with a model that answers at once

Prints for each number of slots: the share of slots that are busy until the last prompt has begun; the time of
all over the sum of the calls it made, each at the time that such a call takes by itself, without drawing, as
`refengine bench` makes it (measured in between, since a machine may change its speed); the time of
fixed batches over that of the loop; and the loop's own cost, without the model, drawing and text.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from statistics import mean, median

import numpy as np

import refengine
from refengine.generation import Draw, Options, Text
from refengine.loop import Batch, Loop
from refengine.runner import How
from refengine.spec.sample import Sampling

GREEDY = How(Sampling(temperature=0))


def requests(engine, count: int, most: int, longest: int) -> list[tuple[list[int], dict]]:
    """Return prompts of 5 to `longest` random tokens, each with 8 to `most` new tokens to write."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(5), np.log(longest), count)).astype(int)
    ids = [rng.integers(20, engine.config.vocab_size, n).tolist() for n in lengths]
    new = rng.integers(8, most + 1, count)
    return [
        (p, {"max_tokens": int(n), "ignore_eos": True, "temperature": 0})
        for p, n in zip(ids, new, strict=True)
    ]


class Watched:
    """A runner whose calls are counted by kind, size and width, and timed.

    Beside every EACH-th call stand calls of the same size by themselves, as the benchmark makes them, so that
    a machine that is slow for a while is so for both. `paused`: seconds that these take.
    """

    EACH, TWIN = 12, 1000  # the first slot of the calls beside

    def __init__(self, runner, context: int):
        self.runner, self.context, self.seconds, self.paused = runner, context, 0.0, 0.0
        self.calls: Counter = Counter()
        self.spent: Counter = Counter()  # seconds of the loop's calls, by kind
        self.pairs: dict[str, list[tuple[float, float]]] = {
            "read": [],
            "step": [],
        }  # seconds of a call, and beside
        self.rng = np.random.default_rng(1)

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def read(self, parts):
        """Read parts; see Runner."""
        again = [replace(part, slot=self.TWIN + i, how=GREEDY) for i, part in enumerate(parts)]
        whole = all(part.how for part in parts)
        return self.timed("read", again if whole else None, self.read_beside, self.runner.read, parts)

    def step(self, slots, ids, draw=True):
        """Step; see Runner."""
        return self.timed("step", len(slots), self.steps_beside, self.runner.step, slots, ids, draw)

    def timed(self, kind: str, size, beside, call, *args):
        """Return what the call returns; note its seconds, and now and then those of calls beside it."""
        began = time.perf_counter()
        result = call(*args)
        took = time.perf_counter() - began
        self.seconds, self.calls[kind], self.spent[kind] = (
            self.seconds + took, self.calls[kind] + 1, self.spent[kind] + took,
        )  # fmt: skip
        if size and self.calls[kind] % self.EACH == 0:
            began = time.perf_counter()
            self.pairs[kind].append((took, beside(size)))
            self.paused += time.perf_counter() - began
        return result

    def read_beside(self, parts) -> float:
        """Return the seconds of reading the same by itself, the median of three."""
        times = []
        for _ in range(3):
            began = time.perf_counter()
            self.runner.read(parts)
            times.append(time.perf_counter() - began)
            self.runner.drop([part.slot for part in parts])
        return median(times)

    def steps_beside(self, size: int) -> float:
        """Return the seconds of a step of so many sequences, the median of five, one after the other."""
        slots, times = [self.TWIN + i for i in range(size)], []
        self.runner.fill(slots, self.context)
        for _ in range(7):
            ids = self.rng.integers(0, self.runner.config.vocab_size, size).tolist()
            began = time.perf_counter()
            self.runner.step(slots, ids, draw=False)
            times.append(time.perf_counter() - began)
        self.runner.drop(slots)
        return median(times[2:])

    def expected(self) -> float:
        """Return the seconds of all calls at the speed of the calls beside."""
        total = 0.0
        for kind, pairs in self.pairs.items():
            own, beside = (sum(pair[i] for pair in pairs) for i in (0, 1))
            total += self.spent[kind] * (beside / own if pairs else 1.0)
        return total


def through(engine, work: list, slots: int) -> dict:
    """Return what one run of all requests measured."""
    context = round(mean(len(ids) + how["max_tokens"] / 2 for ids, how in work))
    watched, busy, texts = Watched(engine.runner, context), [], [0.0]
    loop = Loop(watched, lambda: engine.tokenizer, size=slots)
    begun: set[int] = set()

    def seen(active: dict) -> None:
        begun.update(sequence.index for sequence in active.values())
        if len(begun) < len(work):
            busy.append(len(active) / slots)

    loop.trace, take = seen, Text.take

    def timed(self, draw):
        began = time.perf_counter()
        result = take(self, draw)
        texts[0] += time.perf_counter() - began
        return result

    Text.take = timed
    other = engine.loop
    engine.__dict__["loop"] = loop
    began = time.perf_counter()
    for _ in engine.generate_batch(iter(work)):
        pass
    took = time.perf_counter() - began
    engine.__dict__["loop"], Text.take = other, take
    took -= watched.paused
    return {
        "seconds": took, "busy": mean(busy) if busy else 1.0, "need": watched.expected(),
        "own": took - watched.seconds - texts[0], "steps": watched.calls["step"],
        "rows": sum(how["max_tokens"] - 1 for _, how in work),
    }  # fmt: skip


def in_batches(engine, work: list, slots: int) -> float:
    """Return the seconds of the same requests in fixed batches, alike in length, each until its last ends."""
    order = sorted(range(len(work)), key=lambda i: len(work[i][0]))
    began = time.perf_counter()
    for start in range(0, len(order), slots):
        for _ in engine.generate_batch(iter([work[i] for i in order[start : start + slots]])):
            pass
    return time.perf_counter() - began


def trace(engine) -> None:
    """Print who is in which slot: a row a slot, a column a turn, a letter a prompt; capitals are reading."""
    work, columns = requests(engine, 20, 24, 900), []
    loop = Loop(engine.runner, lambda: engine.tokenizer, size=4)

    def seen(active: dict) -> None:
        columns.append({slot: (s.index, bool(s.left) or s.text.drawn <= 1) for slot, s in active.items()})

    loop.trace = seen
    engine.__dict__["loop"] = loop
    for _ in engine.generate_batch(iter(work)):
        pass
    for slot in range(4):
        letters = [column.get(slot) for column in columns]
        print("".join(" " if c is None else chr((65 if c[1] else 97) + c[0]) for c in letters).rstrip())


class AtOnce:
    """A runner that has the next token without computing anything."""

    closed = False

    def __init__(self, runner):
        self.model, self.config = runner.model, runner.config
        self.fits, self.refusal = runner.fits, runner.refusal

    def read(self, parts):
        """Return a draw for each prompt that ends."""
        return [Draw(100 + part.slot) if part.last else None for part in parts]

    def step(self, slots, ids, draw=True):
        """Return a draw for each slot."""
        return [Draw(100 + slot) for slot in slots]

    def drop(self, slots):
        """Do nothing: there are no states."""


def cost(engine) -> None:
    """Print the loop's own milliseconds of processor time, without text, for several numbers of slots."""
    print("| slots | ms a step | ms a sequence | ms of text a sequence |\n|---|---|---|---|")
    for slots in (1, 8, 32):
        loop, text = Loop(AtOnce(engine.runner), lambda: engine.tokenizer, size=slots), [0.0]
        take, how = Text.take, Options(max_tokens=200, temperature=0, seed=0, ignore_eos=True)

        def timed(self, draw, take=take, text=text):
            began = time.process_time()
            result = take(self, draw)
            text[0] += time.process_time() - began
            return result

        Text.take, began = timed, time.process_time()
        count = sum(1 for _ in Batch(loop, iter([([5] * 20, how)] * slots)))
        took, Text.take = time.process_time() - began, take
        own = 1e3 * (took - text[0])
        print(f"| {slots} | {own / 200:.3f} | {own / count:.4f} | {1e3 * text[0] / count:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--slots", default="8,32")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new", type=int, default=200, help="new tokens, at most")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    how = {"backend": arguments.backend, "dtype": arguments.dtype, "threads": arguments.threads}
    engine = refengine.load(arguments.model, **how)
    if arguments.trace:
        return trace(engine)
    if arguments.cost:
        return cost(engine)
    work = requests(engine, arguments.prompts, arguments.new, 500)
    print(
        "| slots | busy | s | over its calls | fixed batches over it | own ms a step | of it ms a sequence |"
    )
    print("|---|---|---|---|---|---|---|")
    for slots in map(int, arguments.slots.split(",")):
        engine.batch = slots
        engine.__dict__.pop("loop", None)
        found = through(engine, work, slots)
        fixed = in_batches(engine, work, slots)
        need = found["need"]
        print(
            f"| {slots} | {found['busy']:.3f} | {found['seconds']:.1f} | {found['seconds'] / need:.2f} | "
            f"{fixed / found['seconds']:.2f} | {1e3 * found['own'] / found['steps']:.3f} | "
            f"{1e3 * found['own'] / found['rows']:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

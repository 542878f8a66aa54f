"""Measure a prompt and a step by kind of layer, and the prompt by operation too.

    python -m tools.bench.layers [MODEL] [--backend cpu] [--dtype bfloat16] [--threads 2] [--prompt 512]
                                 [--batch 1] [--context 64] [--rounds 20]

Times are medians of rounds, in milliseconds; with one thread, of its own time, of which other processes take
little. A step by kind of layer is measured inside the compiled loops, by the time of day, so the cpu backend
alone has it; what Python does around them is the difference from the whole step.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import defaultdict
from dataclasses import fields, replace
from statistics import median

import numpy as np

import refengine
from refengine.runner import LocalRunner
from refengine.spec.model import Model

KINDS = {"M": "mamba", "*": "attention", "E": "experts", "-": "mlp", "": "embedding and last norm"}
Times = dict[tuple[str, str], float]  # seconds by (kind of layer, operation)


class Watch:
    """Measures the operations of a backend; those since the last sum over ranks are of that layer's kind."""

    def __init__(self, ops, clock):
        self.clock = clock
        self.times: Times = defaultdict(float)
        self.latest: dict[str, float] = defaultdict(float)
        self.inside = False
        names = [field.name for field in fields(ops)]
        self.ops = replace(ops, **{name: self.timed(name, getattr(ops, name)) for name in names})

    def timed(self, name: str, operation):
        """Return the operation with its time taken; one inside another counts as part of it."""

        def call(*args, **how):
            if self.inside:
                return operation(*args, **how)
            self.inside, began = True, self.clock()
            try:
                return operation(*args, **how)
            finally:
                self.inside = False
                self.latest[name] += self.clock() - began
                if name == "all_reduce":
                    self.to_layer(args[1])

        return call

    def to_layer(self, kind: str) -> None:
        """Count the operations since the last call as those of a layer."""
        for name, seconds in self.latest.items():
            self.times[kind, name] += seconds
        self.latest.clear()


def prompt(model: Model, length: int, rounds: int, clock) -> tuple[float, Times]:
    """Return the median seconds of the layers for a prompt, and of each operation by kind of layer."""
    watch = Watch(model.backend.ops, clock)
    watched = replace(model, backend=replace(model.backend, ops=watch.ops))
    ids = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (1, length))
    whole: list[float] = []
    each: list[Times] = []
    for _ in range(rounds + 1):
        began = clock()
        model.blocks(model.embed(ids), model.new_states(1))
        whole.append(clock() - began)
        watched.blocks(watched.embed(ids), watched.new_states(1))
        watch.to_layer("")
        each.append(dict(watch.times))
        watch.times.clear()
    return median(whole[1:]), {key: median(times[key] for times in each[1:]) for key in each[0]}


def step(model: Model, batch: int, context: int, rounds: int) -> tuple[float, dict[str, float]]:
    """Return the median seconds of a step, and of its layers by kind; "head" is the last norm and product."""
    taken = (ctypes.c_double * 128)()
    steps: list[float] = []
    each: list[list[float]] = []
    runner, slots = LocalRunner(model), list(range(batch))
    runner.fill(slots, context)
    model.backend.step.taken = taken
    for i in range(rounds + 2):
        ctypes.memset(taken, 0, ctypes.sizeof(taken))
        began = time.perf_counter()
        runner.step(slots, [i % model.cfg.vocab_size] * batch, draw=False)
        steps.append(time.perf_counter() - began)
        each.append(list(taken))
    model.backend.step.taken = None
    kinds = {
        KINDS[kind]: median(times[ord(kind)] for times in each[2:])
        for kind in dict.fromkeys(model.cfg.layers)
    }
    return median(steps[2:]), kinds | {"head": median(times[0] for times in each[2:])}


def row(name: str, seconds: float, whole: float, layers: int | str = "") -> None:
    """Print a row of a table."""
    print(f"| {name} | {layers} | {1e3 * seconds:.3f} | {seconds / whole:.0%} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    for name, value in (("threads", 2), ("prompt", 512), ("batch", 1), ("context", 64), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    engine = refengine.load(given.model, given.backend, given.dtype, threads=given.threads)
    model, kinds = engine.model, engine.config.layers
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    whole, times = prompt(model, given.prompt, given.rounds, clock)
    head = "| | layers | ms | share |\n|---|---|---|---|"
    speed = given.prompt / whole
    print(f"A prompt of {given.prompt} tokens: {1e3 * whole:.2f} ms, {speed:.0f} tokens/s\n\n{head}")
    for kind, name in KINDS.items():
        mine = {operation: seconds for (of, operation), seconds in times.items() if of == kind}
        if mine:
            row(f"**{name}**", sum(mine.values()), whole, kinds.count(kind) if kind else "")
            for operation, seconds in sorted(mine.items(), key=lambda item: -item[1]):
                row(operation, seconds, whole)
    row("Python between the operations", max(0.0, whole - sum(times.values())), whole)
    if not hasattr(model.backend.step, "taken"):
        return
    whole, by_kind = step(model, given.batch, given.context, given.rounds)
    print(f"\nA step of {given.batch} after {given.context} tokens: {1e3 * whole:.3f} ms\n\n{head}")
    letters = {name: kind for kind, name in KINDS.items()}
    for name, seconds in by_kind.items():
        row(name, seconds, whole, kinds.count(letters[name]) if name in letters else "")
    row("Python around the loops", max(0.0, whole - sum(by_kind.values())), whole)


if __name__ == "__main__":
    main()

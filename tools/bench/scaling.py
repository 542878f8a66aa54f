"""Measure a model's speed with more ranks and with more threads, in turns within one run.

    python -m tools.bench.scaling MODEL [--layouts 2x1x1,1x2x1] [--prompt 512] [--rounds 5] [--json FILE]

A layout is tp x ep x pp; every rank has one thread. Beside them run one process with one thread, and one with
two. Each loads once and then waits; rounds go through all of them, so that what else the machine does falls
on all alike. Printed: medians, the gain over one thread, what of the gain of two threads that is, and the
bytes that rank 0 sent for a token. mpiexec has to be there (pip install mpich).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from types import SimpleNamespace

import numpy as np

from refengine.runner import How, Part, chunk_length
from refengine.spec.sample import Sampling

CONTEXT = 64  # tokens before decoding


def measure(runner, what: str, size: int, batch: int, steps: int) -> float:
    """Return seconds of a prefill of `size` tokens a sequence, or of the median decoding step."""
    rng, length = np.random.default_rng(0), CONTEXT if what == "decode" else size
    rows = rng.integers(0, runner.config.vocab_size, (batch, length)).tolist()
    slots, greedy, chunk = list(range(batch)), How(Sampling(temperature=0)), chunk_length(runner.config)
    began = time.perf_counter()
    for start in range(0, length, chunk):
        how, last = None if start else greedy, start + chunk >= length
        drawn = runner.read([Part(i, rows[i][start : start + chunk], how, last) for i in slots])
    took = time.perf_counter() - began
    times = []
    for _ in range(steps + 2 if what == "decode" else 0):
        began = time.perf_counter()
        drawn = runner.step(slots, [draw.id for draw in drawn])
        times.append(time.perf_counter() - began)
    runner.drop(slots)
    return median(times[2:]) if times else took


def work(arguments) -> None:
    """Run one process or one rank, which reads its tasks from the standard input of rank 0."""
    out, sys.stdout = sys.stdout, sys.stderr
    tp, ep, pp = map(int, arguments.worker.split("x"))
    how = {"backend": arguments.backend, "dtype": arguments.dtype, "threads": arguments.threads}
    if tp * ep * pp == 1:
        import refengine

        engine, comm = refengine.load(arguments.model, **how), SimpleNamespace(rank=0, sent={})
    else:
        from refengine.ranks.load import load as load_rank

        engine = load_rank(arguments.model, **how, tp=tp, ep=ep, pp=pp, timeout=600)
        comm = engine.runner.comm
    if comm.rank:
        return engine.follow()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        before = sum(comm.sent.values())
        took = measure(engine.runner, *json.loads(line))
        print(json.dumps([took, sum(comm.sent.values()) - before]), file=out, flush=True)
    engine.close()


class Group:
    """Hold the processes of one layout, which wait for tasks."""

    def __init__(self, arguments, layout: str, threads: int):
        tp, ep, pp = map(int, layout.split("x"))
        self.ranks = tp * ep * pp
        alone = f"{threads} thread{'s' * (threads > 1)}"
        self.name = alone if self.ranks == 1 else f"tp {tp} ep {ep} pp {pp}"
        call = [sys.executable, "-m", "tools.bench.scaling", arguments.model, "--worker", layout]
        call += ["--backend", arguments.backend, "--dtype", arguments.dtype, "--threads", str(threads)]
        launch = [] if self.ranks == 1 else ["mpiexec", "-n", str(self.ranks)]
        self.process = subprocess.Popen(
            launch + call,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        if self.process.stdout.readline() != "ready\n":
            raise SystemExit(f"{self.name} did not start")

    def __call__(self, *task) -> list:
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """Close the standard input of the processes and wait for them."""
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Parse the arguments, and run a worker or the whole measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layouts", default="2x1x1,1x2x1,1x1x2", help="tp x ep x pp, with commas between")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", help="write the medians to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    groups = [Group(arguments, "1x1x1", threads) for threads in (1, 2)]
    groups += [Group(arguments, layout, 1) for layout in arguments.layouts.split(",")]
    tasks = {
        f"prefill of {arguments.prompt}": ("prefill", arguments.prompt, arguments.batch, 0),
        f"decode after {CONTEXT}": ("decode", 1, arguments.batch, arguments.steps),
    }
    taken = {(what, group.name): [] for what in tasks for group in groups}
    for group in groups:
        group("prefill", 64, arguments.batch, 0)
    for _ in range(arguments.rounds):
        for what, task in tasks.items():
            for group in groups:
                taken[what, group.name].append(group(*task))
    for group in groups:
        group.end()
    report(arguments, tasks, groups, taken)


def report(arguments, tasks: dict, groups: list[Group], taken: dict) -> None:
    """Print the table, and write the figures as JSON if asked."""
    print(f"{arguments.backend}, {arguments.dtype}, batch {arguments.batch}, medians of {arguments.rounds}\n")
    print("| | | ms | over 1 thread | of what 2 threads reach | KB that rank 0 sent |")
    print("|---|---|---|---|---|---|")
    figures = []
    for what, task in tasks.items():
        one, two = (median(t for t, _ in taken[what, group.name]) for group in groups[:2])
        for group in groups:
            took = median(t for t, _ in taken[what, group.name])
            calls = arguments.steps + 2 if task[0] == "decode" else 1
            sent = taken[what, group.name][0][1] / calls
            figures.append({"what": task[0], "layout": group.name, "seconds": took, "sent": sent})
            share = f"{two / took:.0%}" if group.ranks > 1 else ""
            said = f"{sent / 1e3:.1f}" if group.ranks > 1 and task[0] == "prefill" else ""
            print(f"| {what} | {group.name} | {took * 1e3:.1f} | {one / took:.2f} | {share} | {said} |")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"prompt": arguments.prompt, "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()

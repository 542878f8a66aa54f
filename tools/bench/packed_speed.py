"""Measure the speed of packed weights, in paired, alternating runs, medians, and ratios.

    python -m tools.bench.packed_speed MID NAME=MODEL[,FILE.gguf] ... [--llama LLAMA_BENCH] [--rounds 5]
        [--own-time] [--tasks decode,batch,prefill]
    python -m tools.bench.packed_speed --products [--threads 1] [--kinds NVFP4,q4_k] [--dtype bfloat16]

The first prints tokens/s of decoding (one sequence and eight) and of a prompt of 512 tokens: of MID, which is
in bfloat16, of each MODEL (a directory or a GGUF file), and of llama.cpp on FILE.gguf (by default MODEL where
that is one) through its program llama-bench. The second prints how many G weights a second products of one
row and more take of matrices of random codes, by kind, of the best of the runs; with one thread by its
own time, which other processes disturb less.

With --own-time the first measures processor time instead, of one thread on each side: on a busy machine
llama.cpp's threads wait for each other in a loop, and wall time means little. From a longer run the time of a
shorter one is subtracted, so that filling the cache does not count. Linux only; llama.cpp runs through its
Python bindings, llama_cpp.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from tools.bench.cpu import CONTEXT, Worker, paired

SHAPE = (1344, 4096)  # outputs, inputs
ROWS = (1, 2, 4, 8, 24, 64, 512)
LARGE = 2**25  # bytes of the matrices that a measurement goes through


def random_weights(kind: str):
    """Return a matrix of SHAPE in a kind; its numbers mean nothing."""
    import ml_dtypes

    from refengine.spec import blocks
    from refengine.spec.quant import Packed

    rng, (outs, n) = np.random.default_rng(0), SHAPE

    def codes(*shape: int):
        return rng.integers(0, 112, shape, np.uint8)  # no code of a NaN

    if kind in ("bfloat16", "float32"):
        return rng.standard_normal(SHAPE, np.float32).astype(getattr(ml_dtypes, kind, np.float32))
    if kind == "FP8":
        return Packed(kind, codes(outs, n), np.array(1, np.float32))
    if kind == "MXFP8":
        return Packed(kind, codes(outs, n), codes(outs, n // 16))
    if kind == "NVFP4":
        return Packed(kind, codes(outs, n // 2), codes(outs, n // 16), np.float32(1))
    form = blocks.FORMATS[kind]
    return blocks.Blocks(form, codes(outs, n // form.columns * form.nbytes))


def products(threads: int, rounds: int, kinds: list[str], dtype: str = "float32") -> None:
    """Print G weights/s, and GB/s for one row, of the best of alternating runs."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    from refengine.backends.cpu import cpu_backend
    from refengine.backends.cpu.arrays import BLOCKS, PACKED

    linear, rng = cpu_backend(dtype, threads).ops.linear, np.random.default_rng(1)
    kinds = ["bfloat16", *(kinds or [*PACKED, *BLOCKS])]
    made = {kind: random_weights(kind) for kind in kinds}
    copies: dict[str, list] = {}
    for kind, w in made.items():
        copies[kind] = [w, *(_copy(w) for _ in range(LARGE // w.nbytes))]
    least: dict = {}
    for _ in range(rounds):
        for rows in ROWS:
            x = rng.standard_normal((rows, SHAPE[1])).astype(np.float32)
            for kind in kinds:
                some = copies[kind][: 1 if rows > 64 else None]
                began = clock()
                for w in some:
                    linear(x, w)
                taken = (clock() - began) / len(some)
                least[kind, rows] = min(taken, least.get((kind, rows), taken))
    print(f"| kind | bits | GB/s | {' | '.join(f'{rows} rows' for rows in ROWS)} |")
    print("|---" * (3 + len(ROWS)) + "|")
    size = SHAPE[0] * SHAPE[1]
    for kind in kinds:
        speeds = [f"{1e-9 * size / least[kind, rows]:.2f}" for rows in ROWS]
        read = 1e-9 * made[kind].nbytes / least[kind, 1]
        print(f"| {kind} | {8 * made[kind].nbytes / size:.2f} | {read:.1f} | {' | '.join(speeds)} |")


def _copy(w):
    """Return the same matrix elsewhere in memory."""
    from dataclasses import fields, replace

    if isinstance(w, np.ndarray):
        return w.copy()
    parts = {f.name: getattr(w, f.name) for f in fields(w)}
    return replace(w, **{name: a.copy() for name, a in parts.items() if isinstance(a, np.ndarray)})


def llama(program: str, file: str, threads: int) -> Callable:
    """Return work(task, size, context, steps) -> seconds, by llama-bench: a process a measurement."""

    def work(task: str, size: int, context: int, steps: int) -> float:
        if task == "decode" and size > 1:
            return float("nan")
        prompt, new = (size, 0) if task == "prefill" else (0, steps)
        call = [program, "-m", file, "-p", str(prompt), "-n", str(new), "-t", str(threads), "-r", "1"]
        if task == "decode":
            call += ["-d", str(context)]
        run = subprocess.run([*call, "-o", "json"], capture_output=True, check=True, text=True)
        speed = json.loads(run.stdout)[-1]["avg_ts"]
        return (size if task == "prefill" else 1) / speed

    return work


def own_time(process: int, work: Callable, task: str, size: int, steps: int) -> float:
    """Return the processor seconds of a process for a step of decoding, or for a prompt.

    work: makes the process do (task, size, steps).
    """

    def spent(count: int) -> float:
        began = _scheduled(process)
        done = work(task, size, count)
        return _scheduled(process) - began if done == done else done

    return spent(0) if task == "prefill" else (spent(4 + steps) - spent(4)) / steps


def own_sides(name: str, mine: str, theirs: str) -> dict[str, Callable]:
    """Return the sides of a model with one thread each; llama.cpp through its Python bindings."""
    from tools.bench import peers

    worker = Worker("cpu", mine, 1)
    sides = {
        name: partial(
            own_time, worker.process.pid, lambda task, size, steps: worker(task, size, CONTEXT, steps)
        )
    }
    if theirs:
        peer = peers.Worker("llama.cpp", theirs, "bfloat16", 1)
        sides[f"{name}, llama.cpp"] = partial(own_time, peer.process.pid, peer)
    return sides


def _scheduled(process: int) -> float:
    """Return the processor seconds of a process so far, of all its threads."""
    files = Path(f"/proc/{process}/task").glob("*/schedstat")
    return 1e-9 * sum(int(file.read_text().split()[0]) for file in files)


def alternating(sides: dict[str, Callable], task: tuple, rounds: int) -> dict[str, float]:
    """Return the median of each side's results, of runs that go through the sides in turn."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side(*task))
    return {name: median(results) for name, results in found.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="the model in bfloat16")
    parser.add_argument("others", nargs="*", help="NAME=MODEL or NAME=MODEL,FILE.gguf")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--kinds", default="", help="of --products, with commas between them")
    parser.add_argument("--dtype", default="float32", help="of --products: float32 or bfloat16")
    parser.add_argument("--llama", help="the program llama-bench")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--own-time", action="store_true", help="processor time of one thread")
    parser.add_argument("--tasks", default="decode,batch,prefill", help="with commas between them")
    arguments = parser.parse_args()
    threads, rounds = arguments.threads, arguments.rounds
    if arguments.products:
        kinds = [kind for kind in arguments.kinds.split(",") if kind]
        return products(threads, rounds, kinds, arguments.dtype)
    if not arguments.model:
        parser.error("name the model in bfloat16, or --products")
    names = {"bfloat16": arguments.model} | dict(other.split("=", 1) for other in arguments.others)
    sides: dict[str, Callable] = {}
    for name, paths in names.items():
        mine, _, theirs = paths.partition(",")
        theirs = theirs or (mine if mine.endswith(".gguf") else "")
        sides |= own_sides(name, mine, theirs if arguments.llama else "") if arguments.own_time else {}
        if not arguments.own_time:
            sides[name] = Worker("cpu", mine, threads)
            if arguments.llama and theirs:
                sides[f"{name}, llama.cpp"] = llama(arguments.llama, theirs, threads)
    steps, prompt = arguments.steps, arguments.prompt
    tasks = {
        "decode": ("decode", ("decode", 1, CONTEXT, steps), 1),
        "batch": ("decode, batch 8", ("decode", 8, CONTEXT, steps), 8),
        "prefill": (f"prefill {prompt}", ("prefill", prompt, 0, 0), prompt),
    }
    print("| | model | tokens/s | over bfloat16 | over llama.cpp |\n|---|---|---|---|---|")
    for what, task, tokens in (tasks[name] for name in arguments.tasks.split(",")):
        if arguments.own_time:
            found = alternating(sides, (*task[:2], steps), rounds)
        else:
            found = paired(sides, task, rounds)
        for name, taken in found.items():
            others = found["bfloat16"], found.get(f"{name}, llama.cpp", float("nan"))
            ratios = [f"{other / taken:.2f}x" if other == other else "" for other in others]
            if taken == taken:
                print(f"| {what} | {name} | {tokens / taken:.1f} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()

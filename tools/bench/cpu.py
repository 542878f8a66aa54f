"""Measure every bar of the CPU backend in one command: paired, alternating runs, medians, and ratios.

    python -m tools.bench.cpu MID [--before TREE] [--gguf FILE] [--threads 2] [--rounds 5] [--long 65536]
    python -m tools.bench.cpu --quick       a short run of every line, on the embedded model
    python -m tools.bench.cpu --products    products of many rows beside those of NumPy and PyTorch

MID: the checkpoint of `python -m tools.write.random_checkpoint mid MID`. TREE: a checkout of the commit
before, whose torch backend is measured beside. Each engine loads once, in a process of its own, and the
rounds go through the engines one after another. Times under load are taken with one process that loops
on each processor. What was not asked for is printed as "not measured".
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

CONTEXT = 64  # tokens before decoding


def work_of(backend: str, model: str, threads: int) -> Callable:
    """Return work(task, size, context, steps) -> seconds, of an engine that is loaded now."""
    import numpy as np

    import refengine
    from refengine import backend as backends
    from refengine import bench
    from refengine.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    dtype = "float32" if backend == "numpy" else "bfloat16"
    made = backends.make(backend, checkpoint.config, dtype, threads=threads)
    engine = refengine.load(model, backend=made, threads=threads)
    runner = engine.runner

    def work(task: str, size: int, context: int, steps: int) -> float:
        if task == "decode":
            return bench.decode_seconds(runner, size, context, steps)
        if task == "bandwidth":
            return 1 / bench.read_bandwidth(threads)
        if task == "peak":
            return 1 / bench.matrix_peak(runner.model)
        ids = np.random.default_rng([1, size]).integers(0, runner.config.vocab_size, size).tolist()
        if task == "generate":  # seconds a token after the first
            times = []
            for _ in engine.generate(ids[:context], max_tokens=size, ignore_eos=True, temperature=0):
                times.append(time.perf_counter())
            return (times[-1] - times[0]) / max(1, len(times) - 2)
        began = time.perf_counter()
        bench.prefill(runner, ids)
        return time.perf_counter() - began

    return work


class Worker:
    """Runs an engine in its own process: one line of JSON in, one line out."""

    def __init__(self, backend: str, model: str, threads: int, tree: str | None = None):
        here = os.environ | {"OMP_NUM_THREADS": str(threads)} | ({"PYTHONPATH": tree} if tree else {})
        call = [
            sys.executable, os.path.abspath(__file__), model, "--worker", backend, "--threads", str(threads),
        ]  # fmt: skip
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(call, stdin=pipe, stdout=pipe, text=True, env=here, cwd=tree or ".")

    def __call__(self, *task) -> float:
        """Return the seconds of a task."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(task), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended: {self.process.args}")
        return float(line)


def serve(arguments) -> None:
    """Do the tasks of standard input until it ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    work = work_of(arguments.worker, arguments.model, arguments.threads)
    for line in sys.stdin:
        print(work(*json.loads(line)), file=out, flush=True)


def paired(workers: dict[str, Callable], task: tuple, rounds: int) -> dict[str, float]:
    """Return the median seconds of each worker, of alternating runs, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds + 1):
        for name, worker in workers.items():
            taken[name].append(worker(*task))
    return {name: median(times[1:]) for name, times in taken.items()}


def beside(worker: Callable, first: tuple, second: tuple, rounds: int) -> tuple[float, float]:
    """Return the median seconds of two tasks of a worker, of alternating runs."""
    found = paired({"a": lambda: worker(*first), "b": lambda: worker(*second)}, (), rounds)
    return found["a"], found["b"]


class Load:
    """Keeps one process that loops on each processor while it is entered."""

    def __enter__(self):
        count = len(os.sched_getaffinity(0))
        self.loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]

    def __exit__(self, *_):
        for process in self.loops:
            process.kill()
            process.wait()


def first_token(rounds: int) -> float:
    """Return the median seconds from the start of a process to its first token.

    Python files are compiled, as they are where the package is installed.
    """
    command = [sys.executable, "-m", "refengine", "generate", "Once", "-n", "1", "--no-echo"]
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        here = os.environ | {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(rounds + 1):
            began = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=here) as process:
                assert process.stdout
                process.stdout.read(1)
                taken.append(time.perf_counter() - began)
    return median(taken[1:])


PRODUCTS = ((960, 1344), (1344, 960), (4096, 1344))  # outputs, inputs: those of `mid`
ROWS = (32, 64, 128, 512, 2048)


def libraries(threads: int) -> dict[str, Callable]:
    """Return by name the products x [r i], weight [o i] bfloat16, the same in float32 -> y [r o]."""
    import numpy as np

    from refengine.backends.cpu import cpu_backend

    linear, piece = cpu_backend("bfloat16", threads).ops.linear, 1 << 20

    def widened(x, w, _, product=lambda x, w: x @ w.T):
        step = max(1, piece // w.shape[1])
        return [product(x, w[at : at + step].astype(np.float32)) for at in range(0, len(w), step)]

    found = {
        "cpu, bf16": lambda x, w, wide: linear(x, w),
        "cpu, f32": lambda x, w, wide: linear(x, wide),
        "NumPy, bf16 widened": widened,
        "NumPy, f32": lambda x, w, wide: x @ wide.T,
    }
    try:
        import torch
    except ModuleNotFoundError:
        return found
    from refengine.backends.pytorch.products import Products

    torch.set_num_threads(threads)
    products, tensor = Products(torch.float32), torch.from_numpy
    return found | {
        "PyTorch, bf16 widened": lambda x, w, wide: products.linear(
            tensor(x), tensor(w.view(np.int16)).view(torch.bfloat16)
        ),
        "PyTorch, f32": lambda x, w, wide: torch.nn.functional.linear(tensor(x), tensor(wide)),
    }


def products(threads: int, rounds: int) -> None:
    """Print GFLOP/s, of the best of alternating runs, for shapes of `mid` and numbers of rows.

    One thread is timed by its own time, which other processes take little from.
    """
    import ml_dtypes
    import numpy as np
    from threadpoolctl import threadpool_limits

    each, clock = libraries(threads), time.thread_time if threads == 1 else time.perf_counter
    threadpool_limits(threads)
    print(f"| shape | rows | {' | '.join(each)} |\n|---|---|{'---|' * len(each)}")
    rng = np.random.default_rng(0)
    for outs, ins in PRODUCTS:
        w = rng.standard_normal((outs, ins)).astype(ml_dtypes.bfloat16)
        wide = w.astype(np.float32)
        for rows in ROWS:
            x, least = rng.standard_normal((rows, ins)).astype(np.float32), dict.fromkeys(each, float("inf"))
            for _ in range(rounds):
                for name, work in each.items():
                    began = clock()
                    work(x, w, wide)
                    least[name] = min(least[name], clock() - began)
            speeds = [f"{2e-9 * rows * outs * ins / taken:.0f}" for taken in least.values()]
            print(f"| {outs} x {ins} | {rows} | {' | '.join(speeds)} |", flush=True)


def main() -> None:
    """Print the table of bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--quick", action="store_true", help="one short round of each line")
    parser.add_argument("--products", action="store_true", help="products of many rows only")
    parser.add_argument("--before")
    parser.add_argument("--gguf")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--prompt", default="512,4096")
    parser.add_argument("--long", type=int, default=65536)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return serve(arguments)
    if arguments.products:
        return products(arguments.threads, 4 * arguments.rounds)
    if arguments.quick:
        arguments.rounds, arguments.steps, arguments.prompt, arguments.long = 1, 4, "64", 512
    if os.path.exists(arguments.model):
        arguments.model = os.path.abspath(arguments.model)
    threads, rounds, steps = arguments.threads, arguments.rounds, arguments.steps
    ours = Worker("cpu", arguments.model, threads)
    before = Worker("torch", arguments.model, threads, arguments.before) if arguments.before else None
    both = {"cpu": ours} | ({"before": before} if before else {})
    print("| | measured | bar |\n|---|---|---|")

    def row(what: str, measured: str, bar: str) -> None:
        print(f"| {what} | {measured} | {bar} |", flush=True)

    def over_before(what: str, task: tuple, tokens: int, bar: str) -> float:
        found = paired(both, task, rounds)
        other = f", {found['before'] / found['cpu']:.2f}x" if before else ", not measured against before"
        row(what, f"{tokens / found['cpu']:.1f} tokens/s{other}", bar)
        return found["cpu"]

    quiet: dict = {}
    lengths = [int(length) for length in arguments.prompt.split(",")]
    short = lengths[0]
    for length in lengths:
        quiet[length] = over_before(f"prefill {length}", ("prefill", length, 0, 0), length, "1.15x before")
    for batch in (1, 8):
        quiet["decode", batch] = over_before(
            f"decode, batch {batch}", ("decode", batch, CONTEXT, steps), batch, "1.1x before at batch 8"
        )
    if arguments.gguf:
        from tools.bench.peers import llama

        peer = llama(arguments.gguf, "bfloat16", threads)
        sides: dict[str, Callable] = {
            "cpu": lambda task, size, _, n: ours(task, size, CONTEXT, n),
            "llama": peer,
        }
        sides["llama"] = lambda task, size, _, n: peer(task, size, n)
        for task, size, bar in (("prefill", 512, "1.7x"), ("decode", 1, "1.2x")):
            found = paired(sides, (task, size, 0, steps), rounds)
            row(f"{task} {size} over llama.cpp", f"{found['llama'] / found['cpu']:.2f}x", bar)
    else:
        row("over llama.cpp", "not measured", "1.7x prefill, 1.2x decode")
    from refengine import bench
    from refengine.checkpoint import Checkpoint

    cfg = Checkpoint.open(arguments.model).config
    bandwidth, peak = 1 / ours("bandwidth", 0, 0, 0), 1 / ours("peak", 0, 0, 0)
    read = bench.bytes_a_step(cfg, 2, 4, 1, CONTEXT) / quiet["decode", 1] / bandwidth
    row("decode, share of the read bandwidth", f"{read:.0%} of {bandwidth / 1e9:.1f} GB/s", "85 %")
    step, through = beside(ours, ("decode", 1, CONTEXT, steps), ("generate", 64, CONTEXT, 0), rounds)
    row("through generate", f"{step / through:.0%} of bench's step", "95 %")
    step, long = beside(ours, ("decode", 1, CONTEXT, steps), ("decode", 1, arguments.long, steps), rounds)
    kv = 4 * cfg.num_key_value_heads * cfg.head_dim * arguments.long * cfg.layers.count("*")
    work = 4 * cfg.num_attention_heads * cfg.head_dim * arguments.long * cfg.layers.count("*")
    least = max(kv / bandwidth, work / peak)
    told = f"{1e3 * (long - step):.1f} ms, {(long - step) / least:.2f}x {1e3 * least:.1f} ms"
    row(f"{arguments.long} tokens of context", told, "at most 1.2x")
    one = Worker("cpu", arguments.model, 1)
    with Load():
        for what, task, alone in (
            ("decode", ("decode", 1, CONTEXT, steps), quiet["decode", 1]),
            (f"prefill {short}", ("prefill", short, 0, 0), quiet[short]),
        ):
            found = paired({"all": ours, "one": one}, task, rounds)
            told = f"{alone / found['all']:.0%} of quiet, {found['one'] / found['all']:.2f}x one thread"
            row(f"{what}, a loop on each processor", told, "40 %, 0.9x")
    tiny = {"cpu": Worker("cpu", "tiny", threads), "numpy": Worker("numpy", "tiny", threads)}
    for what, task, bar in (
        ("decode", ("decode", 1, CONTEXT, 10 * steps), "5x"),
        ("prefill 512", ("prefill", 512, 0, 0), "3x"),
    ):
        found = paired(tiny, task, rounds)
        row(f"embedded model, {what}", f"{found['numpy'] / found['cpu']:.1f}x NumPy", bar)
        if what == "decode":
            step, through = beside(tiny["cpu"], task, ("generate", 200, 4, 0), 2 * rounds)
            told = f"{1e3 * (through - step):.3f} ms a token"
            row("embedded model, generate above bench's step", told, "0.15 ms")
    row("time to the first token, process start included", f"{first_token(2 * rounds):.2f} s", "0.35 s")


if __name__ == "__main__":
    main()

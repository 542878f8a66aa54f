"""The same checkpoint through refengine and through its peers, in turns, on this machine.

    python -m tools.bench.peers MODEL [--threads 2] [--prompt 512] [--batch 1,8] [--rounds 3] [--gguf FILE]
        [--reread]

Every engine loads once, in a process of its own, and then waits; the rounds go through the engines one after
another, so that what else the machine does falls on all alike. Printed: the median of each, and ours over
theirs. transformers takes part where it is installed, llama.cpp where `llama_cpp` is and --gguf names the
converted model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

CONTEXT = 64  # tokens before decoding


def ours(model: str, dtype: str, threads: int):
    """Return work(task, size, steps) -> seconds.

    A task is a "prefill" of `size` tokens, or "decode": the median step with `size` sequences.
    """
    import torch

    from refengine import bench
    from refengine.backends.pytorch import torch_backend
    from refengine.checkpoint import Checkpoint
    from refengine.runner import LocalRunner
    from refengine.spec.model import Model

    torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(model).in_large_pages()
    runner = LocalRunner(Model.build(checkpoint.config, checkpoint.read, torch_backend(dtype)))

    def work(task: str, size: int, steps: int) -> float:
        if task == "decode":
            return bench.decode_seconds(runner, size, CONTEXT, steps)
        began = time.perf_counter()
        bench.prefill(runner, prompt(runner.config.vocab_size, 1, size)[0].tolist())
        return time.perf_counter() - began

    return work


def transformers(model: str, dtype: str, threads: int):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    built = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    for module in built.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))

    def step(ids: np.ndarray, past=None):
        out = built(torch.from_numpy(ids), past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.past_key_values

    def work(task: str, size: int, steps: int) -> float:
        vocabulary, times = built.config.vocab_size, []
        past, begin = None, (size, CONTEXT) if task == "decode" else (1, size)
        began = time.perf_counter()
        past = step(prompt(vocabulary, *begin))
        if task == "prefill":
            return time.perf_counter() - began
        for _ in range(steps + 2):
            began = time.perf_counter()
            past = step(prompt(vocabulary, size, 1), past)
            times.append(time.perf_counter() - began)
        return median(times[2:])

    return work


def llama(gguf: str, dtype: str, threads: int):
    from llama_cpp import Llama

    built = Llama(gguf, n_ctx=8192, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False)

    def work(task: str, size: int, steps: int) -> float:
        if task == "decode" and size > 1:
            return float("nan")
        built.reset()
        built._ctx.kv_cache_clear() if hasattr(built._ctx, "kv_cache_clear") else None
        began = time.perf_counter()
        built.eval(prompt(built.n_vocab(), 1, size if task == "prefill" else CONTEXT)[0].tolist())
        if task == "prefill":
            return time.perf_counter() - began
        times = []
        for _ in range(steps + 2):
            began = time.perf_counter()
            built.eval(prompt(built.n_vocab(), 1, 1)[0].tolist())
            times.append(time.perf_counter() - began)
        return median(times[2:])

    return work


ENGINES = {"refengine": ours, "transformers": transformers, "llama.cpp": llama}


def prompt(vocabulary: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng([batch, length]).integers(0, vocabulary, (batch, length))


class Worker:
    """An engine in its own process: one line of JSON in, one line out."""

    def __init__(self, name: str, model: str, dtype: str, threads: int):
        call = [sys.executable, "-m", "tools.bench.peers", "--worker", name, model, "--dtype", dtype]
        limits = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [*call, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | limits,
        )
        self.load_seconds, self.name = self.answer(), name

    def answer(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended: {' '.join(self.process.args)}")
        return float(line)

    def __call__(self, *task) -> float:
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self.answer()


def serve(arguments) -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    began = time.perf_counter()
    work = ENGINES[arguments.worker](arguments.model, arguments.dtype, arguments.threads)
    print(time.perf_counter() - began, file=out, flush=True)
    for line in sys.stdin:
        print(work(*json.loads(line)), file=out, flush=True)


def forget(path: Path) -> None:
    """Take a model's files out of the system's cache of pages: who uses them next reads them from the disk.

    A file that was written a moment ago lies there in small pages, one that is read from the disk perhaps in
    large ones, which are faster to look into: so all engines begin alike, as on a first day.
    """
    for file in [path] if path.is_file() else path.glob("*.safetensors"):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--gguf")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", default="512", help="lengths, with commas between them")
    parser.add_argument("--batch", default="1,8", help="sequences in a decoding step, likewise")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--reread", action="store_true", help="from the disk, not from the cache of pages")
    parser.add_argument("--peers", default="transformers,llama.cpp")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return serve(arguments)
    names = [
        "refengine",
        *(n for n in arguments.peers.split(",") if n and (n != "llama.cpp" or arguments.gguf)),
    ]
    model = {name: arguments.gguf if name == "llama.cpp" else arguments.model for name in names}
    if arguments.reread:
        for path in set(model.values()):
            forget(Path(path))
    workers = []
    for name in names:
        workers.append(Worker(name, model[name], arguments.dtype, arguments.threads))
        workers[-1]("prefill", 256, 0)  # reads its file before the next one does; first calls
    tasks = [("prefill", int(n)) for n in arguments.prompt.split(",")]
    tasks += [("decode", int(n)) for n in arguments.batch.split(",")]
    taken = {(task, worker.name): [] for task in tasks for worker in workers}
    for _ in range(arguments.rounds):
        for task in tasks:
            for worker in workers:
                taken[task, worker.name].append(worker(*task, arguments.steps))
    print(f"{arguments.dtype}, {arguments.threads} threads, medians of {arguments.rounds} alternating runs\n")
    print(
        "| | "
        + " | ".join(f"{name} tokens/s" for name in names)
        + " | "
        + " | ".join(f"over {name}" for name in names[1:])
        + " |"
    )
    print("|---" * (2 * len(names)) + "|")
    for what, size in tasks:
        speed = [size / median(taken[(what, size), name]) for name in names]
        ratios = [f"{speed[0] / other:.2f}" for other in speed[1:]]
        label = f"prefill {size}" if what == "prefill" else f"decode, batch {size}"
        print(f"| {label} | " + " | ".join(f"{s:.1f}" for s in speed) + " | " + " | ".join(ratios) + " |")
    print("\nload: " + ", ".join(f"{w.name} {w.load_seconds:.1f} s" for w in workers))
    for worker in workers:
        worker.process.stdin.close()
        worker.process.wait()


if __name__ == "__main__":
    main()

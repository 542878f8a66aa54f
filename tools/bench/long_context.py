"""Measure a decoding step after long contexts, and the memory that they take, beside what `inspect` says.

    python -m tools.bench.long_context MID [--contexts 64,65536,1048576] [--kv-dtype fp8] [--prefill 4096]

MID: the checkpoint of `python -m tools.write.random_checkpoint mid MID`. The cpu backend; a cache is filled
with noise. The bar of a step is 1.2 times the sum of that after the first context, and the larger of reading
keys and values at the bandwidth, and their arithmetic at the peak of products, both measured here.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

import refengine
from refengine import bench
from refengine.machine import processors
from refengine.storage import Sizes, bytes_on, storage


def resident() -> int:
    """Return the bytes of anonymous memory that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def steps(runner, count: int) -> list[float]:
    """Return the seconds of so many steps of slot 0, after two that are not counted."""
    times, rng = [], np.random.default_rng(1)
    for _ in range(count + 2):
        token = int(rng.integers(0, runner.config.vocab_size))
        began = time.perf_counter()
        runner.step([0], [token], draw=False)
        times.append(time.perf_counter() - began)
    return times[2:]


def main() -> None:
    """Print a table: milliseconds of a step, its bar, and bytes of the states beside what inspect says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--contexts", default="64,65536,262144,1048576")
    parser.add_argument("--kv-dtype")
    parser.add_argument("--ssm-dtype")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prefill", default="", help="also read prompts of these lengths")
    arguments = parser.parse_args()
    kept = {"kv_dtype": arguments.kv_dtype, "ssm_dtype": arguments.ssm_dtype}
    engine = refengine.load(arguments.model, "cpu", "auto", threads=arguments.threads, **kept)
    runner, cfg = engine.runner, engine.config
    stored = storage(engine.checkpoint, **kept)
    size = bytes_on("cpu", cfg, engine.checkpoint.auto_dtype("cpu"), stored.kv, stored.ssm)
    said = Sizes(size["ssm_bytes"] + size["conv_bytes"], size["kv_bytes_per_token"], size["kv_dtype"])
    bandwidth, peak = bench.read_bandwidth(arguments.threads), bench.matrix_peak(engine.model)
    speeds = f"{bandwidth / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s"
    print(f"{arguments.threads} threads: {speeds}; cache in {said.kv}\n")
    print("| tokens before | step, ms | least, ms | bar, ms | step / bar | bytes held | inspect | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    multiplied = (
        4 * cfg.layers.count("*") * cfg.num_attention_heads * cfg.head_dim
    )  # operations a token before
    first = 0.0
    runner.fill([0], 64)
    steps(runner, 2)  # the pages of the weights are there
    runner.drop([0])
    before = resident()  # what one context frees serves the next, and stays resident
    for context in map(int, arguments.contexts.split(",")):
        runner.fill([0], context)
        held, taken = resident() - before, steps(runner, arguments.steps)
        runner.drop([0])
        first = first or median(taken)
        bar = 1.2 * (first + max(said.token * context / bandwidth, multiplied * context / peak))
        print(
            f"| {context:,} | {1e3 * median(taken):.1f} | {1e3 * min(taken):.1f} | {1e3 * bar:.1f} | "
            f"{median(taken) / bar:.2f} | {held / 1e6:.0f} MB | {said.of(context) / 1e6:.0f} MB | "
            f"{held / said.of(context):.2f} |",
            flush=True,
        )
    for length in [int(text) for text in arguments.prefill.split(",") if text]:
        ids = np.random.default_rng(0).integers(0, cfg.vocab_size, length).tolist()
        began = time.perf_counter()
        bench.prefill(runner, ids)
        taken = time.perf_counter() - began
        print(f"prompt of {length:,} tokens: {taken:.1f} s, {length / taken:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()

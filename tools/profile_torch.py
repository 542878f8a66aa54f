"""Where the time of the torch backend goes: products by their number of rows, and a model by its verbs.

    python -m tools.profile_torch [MODEL] [--threads 1] [--dtype bfloat16] [--prompt 512] [--batch 1,8]

With one thread, processor time is counted, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from backends.pytorch import native, torch_backend
from backends.pytorch.products import Products
from refengine import bench
from refengine.checkpoint import Checkpoint
from spec.model import Model

ROWS = (1, 2, 4, 8, 16, 24, 32, 64, 128, 512)


def fastest(work, clock, times: int = 8) -> float:
    taken = []
    for _ in range(times):
        began = clock()
        work()
        taken.append(clock() - began)
    return min(taken)


def products(clock, o: int = 10304, i: int = 1344, copies: int = 6) -> None:
    """GFLOP/s of x [rows i] times bfloat16 weights that come from memory, each of the ways of `Products`."""
    weights = [torch.randn(o, i).bfloat16() for _ in range(copies)]
    turn = iter(range(10**9))
    widening, loops = Products(torch.float32, exact=True), native.load()
    looping = Products(torch.float32, False, loops)

    def loop(x, rows, w):
        return looping.few_rows(x, w, rows)

    def weight():
        return weights[next(turn) % copies]

    print(f"\n| rows | bfloat16 product | widened by pieces | compiled loops |  (GFLOP/s, weights {o} x {i})")
    print("|---|---|---|---|")
    for rows in ROWS:
        x = torch.randn(rows, i)
        narrow = x.bfloat16()
        ways = [partial(F.linear, narrow), partial(widening.widened, x)]
        ways += [partial(loop, x, rows)] if loops else []
        taken = [fastest(lambda way=way: way(weight()), clock, 3 if rows > 32 else 8) for way in ways]
        print(f"| {rows} | " + " | ".join(f"{2 * rows * o * i / t / 1e9:.1f}" for t in taken) + " |")


def by_verb(model: Model, clock, work, times: int = 3) -> dict[str, float]:
    """Seconds of each verb in one `work(model)`, largest first, and all the rest."""
    taken: dict[str, float] = {}

    def timed(name, verb):
        def run(*arguments):
            began = clock()
            result = verb(*arguments)
            taken[name] = taken.get(name, 0.0) + clock() - began
            return result

        return run

    verbs = {name: timed(name, verb) for name, verb in model.backend.ops}
    model = replace(model, backend=replace(model.backend, ops=replace(model.backend.ops, **verbs)))
    work(model)
    taken.clear()
    began = clock()
    for _ in range(times):
        work(model)
    total = clock() - began
    taken["between them"] = total - sum(taken.values())
    return {
        name: t / times for name, t in sorted(taken.items(), key=lambda item: -item[1]) if t > total / 500
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", default="1,8")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    products(clock)
    if not arguments.model:
        return
    checkpoint = Checkpoint.open(arguments.model)
    model = Model.build(checkpoint.config, checkpoint.read, torch_backend(arguments.dtype))
    rng = torch.Generator().manual_seed(0)
    vocabulary, rows = model.cfg.vocab_size, {}
    prompt = torch.randint(vocabulary, (1, arguments.prompt), generator=rng)
    rows[f"prefill {arguments.prompt}"] = by_verb(model, clock, lambda m: bench.prefill(m, prompt))
    for batch in map(int, arguments.batch.split(",")):
        token = torch.randint(vocabulary, (batch, 1), generator=rng)
        states = bench.with_context(model, batch, 64)
        rows[f"decode, batch {batch}"] = by_verb(model, clock, lambda m, s=states, t=token: step(m, t, s), 8)
    print("\n| milliseconds | all | by verb |\n|---|---|---|")
    for what, verbs in rows.items():
        each = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in verbs.items())
        print(f"| {what} | {1e3 * sum(verbs.values()):.1f} | {each} |")


def step(model: Model, token, states: list) -> None:
    h, _ = model.blocks(model.embed(token), states)
    model.backend.fetch(model.head(h))


if __name__ == "__main__":
    main()

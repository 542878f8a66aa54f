"""Measure the time of the torch backend: products by rows, attention by context, a model by its verbs.

    python -m tools.bench.profile_torch [MODEL] [--threads 1] [--dtype bfloat16] [--prompt 512] [--batch 1,8]

With one thread, processor time is counted, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from refengine import bench
from refengine.backends.pytorch import torch_backend
from refengine.backends.pytorch.attention import Cache, attention
from refengine.backends.pytorch.products import Products
from refengine.checkpoint import Checkpoint
from refengine.runner import LocalRunner
from refengine.spec.model import Model

ROWS = (1, 2, 4, 8, 16, 24, 32, 64, 128, 512)
INSIDE = {0: "logits", ord("M"): "mamba2", ord("*"): "attention", ord("E"): "experts", ord("-"): "mlp"}
CONTEXTS = (64, 1024, 16384, 65536)


def fastest(work, clock, times: int = 8) -> float:
    """Return the shortest of several runs, in the clock's seconds."""
    taken = []
    for _ in range(times):
        began = clock()
        work()
        taken.append(clock() - began)
    return min(taken)


def products(clock, o: int = 10304, i: int = 1344, copies: int = 6) -> None:
    """Measure GFLOP/s of x [rows i] times bfloat16 weights from memory: PyTorch's ways, and the loops."""
    weights = [torch.randn(o, i).bfloat16() for _ in range(copies)]
    turn = iter(range(10**9))
    widening, looping = Products(torch.float32), torch_backend("bfloat16", compute="float32")

    def weight():
        return weights[next(turn) % copies]

    print(f"\n| rows | bfloat16 product | widened by pieces | compiled loops |  (GFLOP/s, weights {o} x {i})")
    print("|---|---|---|---|")
    for rows in ROWS:
        x = torch.randn(rows, i)
        narrow = x.bfloat16()
        ways = [partial(F.linear, narrow), partial(widening.widened, x)]
        ways += [partial(looping.ops.linear, x)] if looping.step else []
        taken = [fastest(lambda way=way: way(weight()), clock, 3 if rows > 32 else 8) for way in ways]
        print(f"| {rows} | " + " | ".join(f"{2 * rows * o * i / t / 1e9:.1f}" for t in taken) + " |")


class Sizes(NamedTuple):
    """The sizes of a configuration that a cache needs."""

    num_key_value_heads: int = 2
    head_dim: int = 128


def contexts(clock, heads: int = 32) -> None:
    """Measure GFLOP/s of the attention of one position, whose heads share two key heads of 128 numbers."""
    ways, backend, e = [("PyTorch", attention, torch.float32)], torch_backend("float32"), Sizes().head_dim
    if backend.step:
        looping = backend.ops.attention
        ways += [("compiled loops", looping, torch.float32), ("bfloat16 cache", looping, torch.bfloat16)]
    print("\n| context | " + " | ".join(name for name, *_ in ways) + f" |  (GFLOP/s, {heads} heads of {e})")
    print("|---" * (len(ways) + 1) + "|")
    for t in CONTEXTS:
        taken = [fastest(steps(way, heads, t, dtype), clock, 8) for _, way, dtype in ways]
        print(f"| {t} | " + " | ".join(f"{4 * t * heads * e / took / 1e9:.1f}" for took in taken) + " |")


def steps(way, heads: int, context: int, dtype):
    """Run steps of one sequence, each with one more position to look at."""
    noise = torch.randn(1, context, *Sizes()).to(dtype)
    q, token = torch.randn(1, 1, heads, noise.shape[-1]), noise[:, :1]
    cache = Cache.empty(Sizes(), 1, dtype, torch.device("cpu")).append(noise, noise).append(token, token)

    def step():
        nonlocal cache
        _, cache = way(q, token, token, cache)

    return step


def by_verb(model: Model, clock, work, times: int = 3) -> dict[str, float]:
    """Return the seconds of each verb in one `work(model)`, largest first, and all the rest.

    Where a decoding step is compiled, of each kind of layer, by the clock.
    """
    taken: dict[str, float] = {}

    def timed(name, verb):
        def run(*arguments):
            began = clock()
            result = verb(*arguments)
            taken[name] = taken.get(name, 0.0) + clock() - began
            return result

        return run

    here = model.backend
    changed = {"ops": replace(here.ops, **{name: timed(name, verb) for name, verb in here.ops})}
    inside = (ctypes.c_double * 128)()
    if here.step:
        changed["step"] = copy.copy(here.step)
        changed["step"].taken = inside
    model = replace(model, backend=replace(here, **changed))
    work(model)
    taken.clear()
    ctypes.memset(inside, 0, ctypes.sizeof(inside))
    began = clock()
    for _ in range(times):
        work(model)
    total = clock() - began
    taken |= {INSIDE[i]: seconds for i, seconds in enumerate(inside) if seconds}
    taken["between them"] = total - sum(taken.values())
    return {
        name: t / times for name, t in sorted(taken.items(), key=lambda item: -item[1]) if t > total / 500
    }


def main() -> None:
    """Print the speed of products and of attention and, with a model, where its time goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", default="512")
    parser.add_argument("--batch", default="1,8")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    products(clock)
    contexts(clock)
    if not arguments.model:
        return
    checkpoint = Checkpoint.open(arguments.model).in_large_pages()
    model = Model.build(checkpoint.config, checkpoint.read, torch_backend(arguments.dtype))
    rng = torch.Generator().manual_seed(0)
    vocabulary, rows = model.cfg.vocab_size, {}
    for length in map(int, arguments.prompt.split(",")):
        ids = torch.randint(vocabulary, (length,), generator=rng).tolist()

        def read(model: Model, ids: list[int] = ids) -> None:
            bench.prefill(LocalRunner(model), ids)

        rows[f"prefill {length}"] = by_verb(model, clock, read, max(1, 1536 // length))
    for batch in map(int, arguments.batch.split(",")):
        token = torch.randint(vocabulary, (batch, 1), generator=rng)
        work = token_steps(token, LocalRunner(model).filled(batch, 64, model.backend))
        rows[f"decode, batch {batch}"] = by_verb(model, clock, work, 8)
    print("\n| milliseconds | all | by verb |\n|---|---|---|")
    for what, verbs in rows.items():
        each = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in verbs.items())
        print(f"| {what} | {1e3 * sum(verbs.values()):.1f} | {each} |")


def token_steps(token, states: list):
    """Feed a token more on every call, as the engine decodes."""

    def work(model: Model) -> None:
        nonlocal states
        here = model.backend
        if here.step:
            _, states = here.step(model, token[:, 0], states)
        else:
            h, states = model.blocks(model.embed(token), states)
            here.fetch(model.head(h))

    return work


if __name__ == "__main__":
    main()

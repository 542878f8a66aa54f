"""Measure the parts of a training step, and estimate the time of the whole run:

    python -m tools.tiny.step_time                 (--wall on a quiet machine; else processor time)

One process of one thread, the shapes of the real run. A run of two processes takes the time of one process
on half of the rows, half of the matrices' updates, and the exchange of gradients through shared memory.
"""

import argparse
import random
import statistics
import time

import torch
from tokenizers import Tokenizer

from .checkpoint import CONFIG, PACKAGED
from .model import TinyModel
from .optim import Optimizer, orthogonalize
from .rows import Rows
from .train import MTP_EVERY, STAGES, Plan


def medians(parts, rounds, clock):
    """Return {name: median seconds} of each part, {name: function}; rounds go through the parts in turn."""
    times = {name: [] for name in parts}
    for round_ in range(rounds + 1):
        for name, work in parts.items():
            begun = clock()
            work()
            if round_:  # the first is a warm-up
                times[name].append(clock() - begun)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def measure(rounds=5, clock=time.process_time, tokens=2048, length=512):
    """Return {part: seconds} of one process: layers, losses, parts of the optimizer, rows, exchange."""
    torch.manual_seed(0)
    random.seed(0)
    tokenizer = Tokenizer.from_file(str(PACKAGED / "tokenizer.json"))
    model = TinyModel(CONFIG)
    optimizer = Optimizer(model)
    rows = Rows(tokenizer, 0, 0, tokens, length)
    ids, first, weight = (torch.as_tensor(t) for t in rows.documents(0, 0.0))
    dense = tuple(torch.as_tensor(t) for t in rows.dense(0, 8))
    age, mask = model.borders(first)
    x = torch.randn(*ids.shape, CONFIG["hidden_size"], requires_grad=True)
    other = torch.zeros_like(optimizer.grads)
    matrices = [m for part in optimizer.matrices.values() for m in part]

    def layer(i):
        return lambda: model.layers[i](x, first, age, mask).sum().backward()

    def whole(batch, head):
        main, mtp = model.losses(*batch, head)
        (main if mtp is None else main + mtp).backward()

    def muon():
        for at, end, shape in matrices:
            orthogonalize(optimizer.grads[at:end].view(shape))

    def adam():
        for part in ("adam", "adam_mtp"):
            optimizer._adam(part, 1e-6, 1.0)
        optimizer.average.lerp_(optimizer.values, 0.01)

    def exchange():
        other.copy_(optimizer.grads)
        optimizer.grads.copy_(other)
        optimizer.grads.add_(other).div_(2)

    batch = ids, first, weight
    return medians(
        {
            "Mamba layer": layer(0), "attention layer": layer(1), "expert layer": layer(3),
            "logits and loss": lambda: model.cross_entropy(x[:, :-1], ids[:, 1:], weight[:, 1:]).backward(),
            "trunk": lambda: whole(batch, False), "trunk and prediction head": lambda: whole(batch, True),
            "trunk, dense rows": lambda: whole(dense, False), "Muon, all matrices": muon,
            "Adam and average": adam, "exchange": exchange,
            "rows": lambda: Rows(tokenizer, 1, 0, tokens, length).documents(0, 0.0),
        }, rounds, clock,
    )  # fmt: skip


def minutes(parts, plan):
    """Return the estimated minutes of a plan in two processes, from the seconds of its parts."""
    head = (parts["trunk and prediction head"] - parts["trunk"]) / MTP_EVERY
    rest = head + parts["Muon, all matrices"] / 2 + parts["Adam and average"] + parts["exchange"]
    dense = sum(plan.dense(step) is not None for step in range(plan.steps))
    words = parts["trunk"] + parts["rows"] / Rows.BLOCK
    return (plan.steps * rest + dense * parts["trunk, dense rows"] + (plan.steps - dense) * words) / 60


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wall", action="store_true", help="time by the clock on the wall")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = measure(args.rounds, time.perf_counter if args.wall else time.process_time)
    for name, seconds in parts.items():
        each = Rows.BLOCK if name == "rows" else 1
        print(f"{name:28s} {1000 * seconds / each:8.1f} ms")
    plan = Plan(*STAGES)
    print(f"{plan.steps:,} steps of 2 x 2,048 tokens: {minutes(parts, plan):.0f} minutes")


if __name__ == "__main__":
    main()

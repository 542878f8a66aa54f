"""Estimate the cost of a layout: rank_model.py, applied to GPUs on paper, and checked on this machine.

python -m tools.bench.rank_costs ultra [--nodes 1,2,4] [--batch 1,64]     a table for GPUs, on paper
python -m tools.bench.rank_costs MODEL --check scaling.json     against what scaling.py measured here
mpiexec -n 2 python -m tools.bench.rank_costs --link            latency and bandwidth between two ranks here
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from refengine.spec.config import Config, InputError
from refengine.spec.layout import Layout, plan
from tools.bench.rank_model import GPUS, Link, Machine, most_held, seconds


def layouts(cfg: Config, ranks: int, node: int) -> Iterator[Layout]:
    """Yield the layouts in powers of two whose tp stays within a node."""
    powers = [2**i for i in range(11)]
    for tp in (p for p in powers if p <= min(ranks, node)):
        for ep in (p for p in powers if p * tp <= ranks):
            try:
                yield plan(cfg, tp, ep, ranks // (tp * ep))
            except InputError:
                continue


def table(cfg: Config, machine: Machine, nodes: list[int], batches: list[int]) -> None:
    """Print for each size of a cluster the three quickest layouts that fit."""
    header = "| nodes | tp x ep x pp | GB a rank | batch | ms | share of messages | tokens/s |"
    print(header + "\n" + "|---" * 7 + "|")
    for count in nodes:
        ranks = count * machine.node
        for batch in batches:
            found = []
            for layout in layouts(cfg, ranks, machine.node):
                most = most_held(cfg, layout)
                if most <= 0.9 * machine.memory:
                    took = seconds(cfg, layout, machine, batch, batch, s=2)
                    found.append((sum(took.values()), took["talking"], most, layout))
            if not found:
                print(f"| {count} | none fits | | {batch} | | | |")
            for all_of_it, talking, most, layout in sorted(found, key=lambda f: f[0])[:3]:
                shape = f"{layout.tp} x {layout.ep} x {layout.pp}"
                print(
                    f"| {count} | {shape} | {most / 1e9:.0f} | {batch} | {all_of_it * 1e3:.2f} | "
                    f"{talking / all_of_it:.0%} | {batch / all_of_it:.0f} |"
                )


def check(cfg: Config, path: str, link: Link, s: int) -> None:
    """Print the times expected from runs of one and of two threads beside those measured."""
    run = json.loads(Path(path).read_text())
    seen = {(f["what"], f["layout"]): f["seconds"] for f in run["figures"]}
    tokens = {"prefill": run["prompt"], "decode": 1}
    alone = Machine(1e30, 1e30, 0.0, link, link, 64, 1e30)
    ideal = {
        what: seconds(cfg, Layout(), replace(alone, **{speed: 1.0}), tokens[what], 1, s)["computing"]
        for what, speed in (("decode", "read"), ("prefill", "peak"))
    }
    read, peak = (ideal[what] / seen[what, "1 thread"] for what in ("decode", "prefill"))
    print(f"from one thread: {read / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s\n")
    print("| | | expected ms | measured ms | measured over expected |\n|---|---|---|---|---|")
    for (what, name), took in seen.items():
        if "thread" in name:
            continue
        layout = Layout(*map(int, name.split()[1::2]))
        # decode reads, prefill multiplies: each by the speed that one thread showed in it
        only = replace(alone, read=read) if what == "decode" else replace(alone, peak=peak)
        parts = seconds(cfg, layout, only, tokens[what], 1, s)
        side_by_side = layout.tp * layout.ep  # they share what both processors are worth in the same run
        slower = side_by_side / (seen[what, "1 thread"] / seen[what, "2 threads"]) if side_by_side > 1 else 1
        expected = parts["computing"] * slower + parts["talking"]
        print(f"| {what} | {name} | {expected * 1e3:.1f} | {took * 1e3:.1f} | {took / expected:.2f} |")


def measure_link() -> None:
    """Print latency and bandwidth between two ranks, from the times of a small and of a large all_reduce."""
    import time

    from refengine.ranks.comm.mpi import MPI

    comm, took = MPI(), {}
    for size in (4096, 2**24):
        x, times = np.ones(size // 4, np.float32), []
        for _ in range(200 if size < 1e5 else 20):
            began = time.perf_counter()
            comm.all_reduce(x, (0, 1))
            times.append(time.perf_counter() - began)
        took[size] = median(times)
    if comm.rank == 0:
        bandwidth = 2**24 / (took[2**24] - took[4096])
        print(f"latency {took[4096] * 1e6:.0f} us, bandwidth {bandwidth / 1e9:.2f} GB/s")
    comm.leave(0)


def config(name: str) -> Config:
    """Return the configuration of a release by its name, or that of a checkpoint directory."""
    if name in ("nano", "super", "ultra"):
        from tools.releases import CONFIGS

        return CONFIGS[name]
    return Config.from_hf(json.loads((Path(name) / "config.json").read_text()))


def numbers(text: str) -> list[int]:
    """Return the integers of a comma-separated list."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Parse the arguments, and print a table, a check or the link."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="ultra")
    parser.add_argument("--gpu", choices=GPUS, default="b200")
    parser.add_argument("--nodes", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch", type=numbers, default=[1, 64])
    parser.add_argument("--check", metavar="FILE", help="the --json of tools.bench.scaling")
    parser.add_argument("--latency", type=float, default=20, help="of --check, in microseconds")
    parser.add_argument("--bandwidth", type=float, default=4, help="of --check, in GB/s")
    parser.add_argument("--stream", type=int, default=4, help="bytes of an activation in --check")
    parser.add_argument("--link", action="store_true")
    arguments = parser.parse_args()
    if arguments.link:
        return measure_link()
    cfg = config(arguments.model)
    if arguments.check:
        link = Link(arguments.latency * 1e-6, arguments.bandwidth * 1e9)
        return check(cfg, arguments.check, link, arguments.stream)
    table(cfg, GPUS[arguments.gpu], arguments.nodes, arguments.batch)


if __name__ == "__main__":
    main()

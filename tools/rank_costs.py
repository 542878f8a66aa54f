"""What a layout would cost: the seconds of one call of the model, from bytes, operations and messages.

    python -m tools.rank_costs ultra [--nodes 1,2,4] [--batch 1,64]     a table for GPUs, on paper
    python -m tools.rank_costs MODEL --check scaling.json     against what tools.scaling measured here
    mpiexec -n 2 python -m tools.rank_costs --link            latency and bandwidth between two ranks here

    call = sum over layers of  max(bytes read / read bandwidth, operations / peak)  +  overhead a layer
         + sum over messages of  rounds * latency  +  bytes sent / bandwidth

The slowest rank counts: the one with the most of the experts that the tokens of a call choose. A message
crosses the network if its ranks are not on one node. Stages follow each other: their times add up for a call.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import median

import numpy as np

from refengine.comm import WHOLE
from spec.arrays import DTYPES
from spec.config import Config, InputError
from spec.layout import Layout, plan, span
from spec.shard import Shard, held, held_bytes, rows


@dataclass(frozen=True)
class Link:
    latency: float  # seconds a round
    bandwidth: float  # bytes a second, one way


@dataclass(frozen=True)
class Machine:
    """One rank's device, and what connects it."""

    read: float  # bytes a second
    peak: float  # operations a second
    overhead: float  # seconds a layer
    near: Link  # within a node
    far: Link  # between nodes
    node: int  # ranks
    memory: float  # bytes


# Assumptions, not measurements: bandwidth and peaks are data sheets' (docs/model.md), of which kernels reach
# 80 % and 60 %; latencies of small sums are of the order that is reported for NCCL.
B200 = Machine(0.8 * 8e12, 0.6 * 2.25e15, 8e-6, Link(10e-6, 700e9), Link(25e-6, 40e9), 8, 180e9)
H100 = Machine(0.8 * 3.35e12, 0.6 * 0.989e15, 8e-6, Link(12e-6, 350e9), Link(25e-6, 40e9), 8, 80e9)
GPUS = {"b200": B200, "h100": H100}


@dataclass(frozen=True)
class Message:
    """What a rank says in a call: to how many others at once, in how many rounds, how many bytes in all."""

    what: str
    sent: float
    rounds: int
    ranks: tuple[int, ...]


def added(what: str, size: float, peers: tuple[int, ...]) -> Iterator[Message]:
    """A sum of `size` bytes, as refengine.comm makes it."""
    p = len(peers)
    if p > 1 and (p == 2 or size <= WHOLE):
        yield Message(what, size * (p - 1), 1, peers)
    elif p > 1:
        yield Message(what, 2 * size * (p - 1) / p, 2, peers)


def messages(cfg: Config, shard: Shard, tokens: int, rows_read: int, s: int, w: int = 4) -> Iterator[Message]:
    """All that a rank says in a call of `tokens` tokens, whose logits are read for `rows_read` of them.

    s: bytes of an activation; w: of a statistic, a logit. Every rank of ep has all tokens.
    """
    tp, (first, last) = shard.layout.tp, shard.layers(cfg)
    stream, peers = s * cfg.hidden_size * tokens, shard.peers(tp)
    if first == 0:
        yield from added("embedding", stream, peers)
    for kind in cfg.layers[first:last]:
        if kind == "M" and tp > cfg.n_groups:
            yield from added("norm", w * tokens, shard.peers(tp // cfg.n_groups))
        if kind == "E":
            yield from added("experts", s * (cfg.moe_latent_size or cfg.hidden_size) * tokens, shard.across)
        yield from added(kind, stream, peers)
    if last < len(cfg.layers):
        yield Message("stage", stream, 1, (shard.rank, shard.rank + tp * shard.layout.ep))
    elif tp > 1:
        yield Message("logits", w * cfg.vocab_size / tp * rows_read * (tp - 1), 1, peers)


@lru_cache
def busiest(experts: int, k: int, ep: int, tokens: int) -> float:
    """The mean, over choices at random, of how many experts the busiest rank of ep reads for `tokens`."""
    rng, most, parts = np.random.default_rng(0), [], [span(experts, ep, e) for e in range(ep)]
    for _ in range(200 if tokens < 64 else 20):
        chosen = np.unique([rng.choice(experts, k, replace=False) for _ in range(min(tokens, 512))])
        most.append(max(((chosen >= p.start) & (chosen < p.stop)).sum() for p in parts))
    return float(np.mean(most))


@lru_cache
def part(cfg: Config, kind: str, tp: int, ep: int, tokens: int) -> tuple[float, float]:
    """(bytes read, operations) of a rank in a layer of a kind, or in the head: what `tokens` tokens meet."""
    shard, read, done = Shard(Layout(tp, ep), 0), 0.0, 0.0
    for row in rows(replace(cfg, layers=kind, mtp_layers=""), shard):
        if row.role == "embedding" or (row.role == "lm_head") != (kind == ""):
            continue
        axis, ranges = held(row, cfg, shard)
        kept = row.size // row.shape[axis] * sum(map(len, ranges))
        met, share = 1.0, 1.0
        if row.role == "routed_expert":
            met = busiest(cfg.n_routed_experts, cfg.num_experts_per_tok, ep, tokens) / len(shard.experts(cfg))
            share = met if tokens == 1 else cfg.num_experts_per_tok / cfg.n_routed_experts
        read += kept * DTYPES[row.dtype].itemsize * met
        done += 2 * kept * tokens * share
    return read, done


def seconds(cfg: Config, layout: Layout, machine: Machine, tokens: int, rows_read: int, s: int) -> dict:
    """The time of one call: of weights and products, and of words, over all stages."""
    computing, talking, here = 0.0, 0.0, (layout.tp, layout.ep)
    for stage in range(layout.pp):
        shard = Shard(layout, stage * layout.tp * layout.ep)
        first, last = shard.layers(cfg)
        parts = [part(cfg, kind, *here, tokens) for kind in cfg.layers[first:last]]
        if last == len(cfg.layers):
            parts.append(part(cfg, "", *here, rows_read))
        for read, done in parts:
            computing += max(read / machine.read, done / machine.peak) + machine.overhead
        for message in messages(cfg, shard, tokens, rows_read, s):
            nodes = {rank // machine.node for rank in message.ranks}
            link = machine.near if len(nodes) == 1 else machine.far
            talking += message.rounds * link.latency + message.sent / link.bandwidth
    return {"computing": computing, "talking": talking}


def most_held(cfg: Config, layout: Layout) -> float:
    """Bytes of the stage that holds most, with an embedding and a head, of its first rank."""
    one = Shard(Layout(layout.tp, layout.ep), 0)
    by_kind = {kind: held_bytes(replace(cfg, layers=kind, mtp_layers=""), one) for kind in set(cfg.layers)}
    ends = {role: by_kind[cfg.layers[0]][role] for role in ("embedding", "lm_head")}
    layer = {kind: sum(held.values()) - sum(ends.values()) for kind, held in by_kind.items()}
    stages = [Shard(layout, i * layout.tp * layout.ep).layers(cfg) for i in range(layout.pp)]
    return max(sum(layer[kind] for kind in cfg.layers[a:b]) for a, b in stages) + sum(ends.values())


def layouts(cfg: Config, ranks: int, node: int) -> Iterator[Layout]:
    """Those in which tp stays within a node, in powers of two."""
    powers = [2**i for i in range(11)]
    for tp in (p for p in powers if p <= min(ranks, node)):
        for ep in (p for p in powers if p * tp <= ranks):
            try:
                yield plan(cfg, tp, ep, ranks // (tp * ep))
            except InputError:
                continue


def table(cfg: Config, machine: Machine, nodes: list[int], batches: list[int]) -> None:
    """For each size of a cluster, the three quickest layouts that fit."""
    print("| nodes | tp x ep x pp | GB a rank | batch | ms | of it words | tokens/s |\n" + "|---" * 7 + "|")
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
                print(f"| {count} | {shape} | {most / 1e9:.0f} | {batch} | {all_of_it * 1e3:.2f} | "
                      f"{talking / all_of_it:.0%} | {batch / all_of_it:.0f} |")  # fmt: skip


def check(cfg: Config, path: str, link: Link, s: int) -> None:
    """What the runs of one and of two threads (on two processors) let expect, beside what was seen."""
    run = json.loads(Path(path).read_text())
    seen = {(f["what"], f["layout"]): f["seconds"] for f in run["figures"]}
    tokens = {"prefill": run["prompt"], "decode": 1}
    alone = Machine(1e30, 1e30, 0.0, link, link, 64, 1e30)
    ideal = {what: seconds(cfg, Layout(), replace(alone, **{speed: 1.0}), tokens[what], 1, s)["computing"]
             for what, speed in (("decode", "read"), ("prefill", "peak"))}  # fmt: skip
    read, peak = (ideal[what] / seen[what, "1 thread"] for what in ("decode", "prefill"))
    print(f"from one thread: {read / 1e9:.1f} GB/s, {peak / 1e9:.0f} GFLOP/s\n")
    print("| | | expected ms | seen ms | seen over expected |\n|---|---|---|---|---|")
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
    """The time of a sum between two ranks: a line through small and large ones."""
    import time

    from refengine.comm.mpi import MPI

    comm, took = MPI(), {}
    for size in (4096, 2**24):
        x, times = np.ones(size // 4, np.float32), []
        for _ in range(200 if size < 1e5 else 20):
            began = time.perf_counter()
            comm.sum(x, (0, 1))
            times.append(time.perf_counter() - began)
        took[size] = median(times)
    if comm.rank == 0:
        bandwidth = 2**24 / (took[2**24] - took[4096])
        print(f"latency {took[4096] * 1e6:.0f} us, bandwidth {bandwidth / 1e9:.2f} GB/s")
    comm.leave(0)


def config(name: str) -> Config:
    if name in ("nano", "super", "ultra"):
        from tests.releases import CONFIGS

        return CONFIGS[name]
    return Config.from_hf(json.loads((Path(name) / "config.json").read_text()))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="ultra")
    parser.add_argument("--gpu", choices=GPUS, default="b200")
    parser.add_argument("--nodes", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch", type=numbers, default=[1, 64])
    parser.add_argument("--check", metavar="FILE", help="the --json of tools.scaling")
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

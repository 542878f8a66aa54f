"""Model the seconds of one call of the model on a layout, from bytes, operations and messages.

    call = sum over layers of  max(bytes read / read bandwidth, operations / peak)  +  overhead a layer
         + sum over messages of  rounds * latency  +  bytes sent / bandwidth

The slowest rank counts: the one with the most of the experts that the tokens of a call choose. A message
crosses the network if its ranks are not on one node. Stages follow each other: their times add up for a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from refengine.ranks.comm import WHOLE
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config
from refengine.spec.layout import Layout, span
from refengine.spec.shard import Shard, held, held_bytes, held_tensors


@dataclass(frozen=True)
class Link:
    """Hold the latency and the bandwidth of a connection."""

    latency: float  # seconds a round
    bandwidth: float  # bytes a second, one way


@dataclass(frozen=True)
class Machine:
    """Hold the speeds of the device of a rank, and its connections."""

    read: float  # bytes a second
    peak: float  # operations a second
    overhead: float  # seconds a layer
    near: Link  # within a node
    far: Link  # between nodes
    node: int  # ranks
    memory: float  # bytes


# Assumptions, not measurements: bandwidth and peaks are data sheets' (docs/model.md), of which kernels reach
# 80 % and 60 %; latencies of small sums are of the order that is reported for NCCL.
B200 = Machine(0.8 * 7.7e12, 0.6 * 2.25e15, 8e-6, Link(10e-6, 700e9), Link(25e-6, 40e9), 8, 180e9)
H100 = Machine(0.8 * 3.35e12, 0.6 * 0.989e15, 8e-6, Link(12e-6, 350e9), Link(25e-6, 40e9), 8, 80e9)
GPUS = {"b200": B200, "h100": H100}


@dataclass(frozen=True)
class Message:
    """Hold the bytes that a rank sends in an operation, the rounds it takes, and the ranks that take part."""

    what: str
    sent: float
    rounds: int
    ranks: tuple[int, ...]


def added(what: str, size: float, peers: tuple[int, ...]) -> Iterator[Message]:
    """Yield the message of an all_reduce of `size` bytes, as refengine.ranks.comm sends it."""
    p = len(peers)
    if p > 1 and (p == 2 or size <= WHOLE):
        yield Message(what, size * (p - 1), 1, peers)
    elif p > 1:
        yield Message(what, 2 * size * (p - 1) / p, 2, peers)


def messages(cfg: Config, shard: Shard, tokens: int, rows_read: int, s: int, w: int = 4) -> Iterator[Message]:
    """Yield the messages of a rank in a call of `tokens` tokens; logits are read for `rows_read` of them.

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
    """Return the mean number of experts that the busiest rank of ep reads, over random choices."""
    rng, most, parts = np.random.default_rng(0), [], [span(experts, ep, e) for e in range(ep)]
    for _ in range(200 if tokens < 64 else 20):
        chosen = np.unique([rng.choice(experts, k, replace=False) for _ in range(min(tokens, 512))])
        most.append(max(((chosen >= p.start) & (chosen < p.stop)).sum() for p in parts))
    return float(np.mean(most))


@lru_cache
def part(cfg: Config, kind: str, tp: int, ep: int, tokens: int) -> tuple[float, float]:
    """Return (bytes read, operations) of a rank for `tokens` tokens in a layer of a kind; "" is the head."""
    shard, read, done = Shard(Layout(tp, ep), 0), 0.0, 0.0
    for row in held_tensors(replace(cfg, layers=kind, mtp_layers=""), shard):
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
    """Return the seconds of one call over all stages: computing, and talking (messages)."""
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
    """Return the bytes of the stage that holds most, with an embedding and a head, of its first rank."""
    one = Shard(Layout(layout.tp, layout.ep), 0)
    by_kind = {kind: held_bytes(replace(cfg, layers=kind, mtp_layers=""), one) for kind in set(cfg.layers)}
    ends = {role: by_kind[cfg.layers[0]][role] for role in ("embedding", "lm_head")}
    layer = {kind: sum(held.values()) - sum(ends.values()) for kind, held in by_kind.items()}
    stages = [Shard(layout, i * layout.tp * layout.ep).layers(cfg) for i in range(layout.pp)]
    return max(sum(layer[kind] for kind in cfg.layers[a:b]) for a, b in stages) + sum(ends.values())

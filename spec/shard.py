"""Chapter 21. Shards: the part of a model that each rank holds.

    rank = t + tp (e + ep stage),   t = 0 .. tp - 1,   e = 0 .. ep - 1,   stage = 0 .. pp - 1

Each segment is cut by itself: a rank's rows of `in_proj` are its part of z, of x, of B, of C and of dt, never
a run of rows across them. Where tp exceeds the number of key/value heads, or of groups, several ranks hold
the same head, or the same B and C. ep repeats all but the routed experts. The messages between ranks are in
chapter 22. docs/ranks.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from refengine.spec.arrays import DTYPES, Weight, join
from refengine.spec.config import Config
from refengine.spec.layout import Layout, span, unit
from refengine.spec.tensors import Tensor, table


@dataclass(frozen=True)
class Shard:
    """One rank of a layout."""

    layout: Layout
    rank: int

    @property
    def at(self) -> tuple[int, int, int]:
        """Return t, e, stage."""
        tp, ep = self.layout.tp, self.layout.ep
        return self.rank % tp, self.rank // tp % ep, self.rank // (tp * ep)

    def peers(self, count: int) -> tuple[int, ...]:
        """Return the block of `count` ranks that this one is in: tp, a stage, or those that share a group."""
        first = self.rank - self.rank % count
        return tuple(range(first, first + count))

    @property
    def across(self) -> tuple[int, ...]:
        """Return the ranks of ep that differ from this one in nothing but their experts."""
        (t, _, stage), tp, ep = self.at, self.layout.tp, self.layout.ep
        return tuple(t + tp * (e + ep * stage) for e in range(ep))

    def layers(self, cfg: Config) -> tuple[int, int]:
        """Return the first of this stage's layers, and the first after them."""
        mine = span(len(cfg.layers), self.layout.pp, self.at[2])
        return mine.start, mine.stop

    def experts(self, cfg: Config) -> range:
        """Return the routed experts of this rank."""
        return span(cfg.n_routed_experts, self.layout.ep, self.at[1])

    def local(self, cfg: Config) -> Config:
        """Return the configuration that the mixers see: heads and groups of this rank, but all experts."""
        tp, t = self.layout.tp, self.at[0]
        return replace(
            cfg,
            mamba_num_heads=len(span(cfg.mamba_num_heads, tp, t)),
            n_groups=len(span(cfg.n_groups, tp, t)),
            num_attention_heads=len(span(cfg.num_attention_heads, tp, t)),
            num_key_value_heads=len(span(cfg.num_key_value_heads, tp, t)),
        )


# CUTS of the tensor table: the axis, and the segments along it, each of which is cut by itself.
CUTS = {
    "z|x|B|C|dt": (0, "x x B B dt"), "x|B|C": (0, "x B B"), "heads": (0, "dt"), "inner": (0, "x"),
    "inner_columns": (1, "x"), "q_heads": (0, "q"), "q_columns": (1, "q"), "kv_heads": (0, "kv"),
    "rows": (0, "tp"), "columns": (1, "tp"), "expert_rows": (0, "tp"), "expert_columns": (1, "tp"),
    "shared_rows": (0, "tp"), "shared_columns": (1, "tp"), "vocab": (0, "tp"), "whole": (0, "whole"),
}  # fmt: skip


def held(row: Tensor, cfg: Config, shard: Shard) -> tuple[int, list[range]]:
    """Return the axis, and the ranges along it, that this rank holds of one of `held_tensors`."""
    axis, segments = CUTS[row.cut]
    length, t, tp = row.shape[axis], shard.at[0], shard.layout.tp
    match segments:
        case "whole":
            return axis, [range(length)]
        case "tp":
            return axis, [span(length, tp, t, unit(length))]
    heads_of = {
        "x": (cfg.mamba_num_heads, cfg.mamba_head_dim),
        "B": (cfg.n_groups, cfg.ssm_state_size),
        "dt": (cfg.mamba_num_heads, 1),
        "q": (cfg.num_attention_heads, cfg.head_dim),
        "kv": (cfg.num_key_value_heads, cfg.head_dim),
    }
    ranges, start = [], 0
    for heads, width in (heads_of[segment] for segment in segments.split()):
        mine = span(heads, tp, t)
        ranges.append(range(start + mine.start * width, start + mine.stop * width))
        start += heads * width
    return axis, ranges


def held_tensors(cfg: Config, shard: Shard) -> list[Tensor]:
    """Return the tensors that this rank holds in whole or in part; the last stage has the head."""
    first, last = shard.layers(cfg)
    ends = last == len(cfg.layers)
    looks_up = first == 0 or (ends and (cfg.tie_word_embeddings or cfg.mtp_layers))

    def mine(row: Tensor) -> bool:
        if row.role == "embedding":
            return bool(looks_up)
        if row.role == "routed_expert" and int(row.key.split(".")[2]) not in shard.experts(cfg):
            return False
        if row.layer is None or not row.block.startswith("layers."):
            return ends
        return first <= row.layer < last

    return list(filter(mine, table(cfg)))


def cut(row: Tensor, value: Weight, cfg: Config, shard: Shard) -> Weight:
    """Return the part of one of `held_tensors` that this rank holds: a view, where that is one range."""
    axis, ranges = held(row, cfg, shard)
    pieces = [value[(slice(None),) * axis + (slice(part.start, part.stop),)] for part in ranges]
    return pieces[0] if len(pieces) == 1 else join(pieces, axis)


def held_bytes(cfg: Config, shard: Shard) -> Counter[str]:
    """Return the bytes of the checkpoint that this rank holds, by role."""
    total: Counter[str] = Counter()
    for row in held_tensors(cfg, shard):
        axis, ranges = held(row, cfg, shard)
        share = row.size // row.shape[axis] * sum(map(len, ranges))
        total[row.role] += share * DTYPES[row.dtype].itemsize
    return total

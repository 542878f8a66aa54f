"""Chapter 20. Layouts: the ways to divide a model between ranks (processes).

    tp  tensor parallel: divides every layer by heads, groups, widths, and the vocabulary
    ep  expert parallel: divides the routed experts, and the rows of a batch where there are several
    pp  pipeline parallel: divides the list of layers into stages

Heads are divided evenly, and groups of heads stay whole, or several ranks share a group. Other widths are
divided into parts that need not be equal. An impossible layout is refused by name. docs/ranks.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from refengine.spec.config import Config, InputError


@dataclass(frozen=True)
class Layout:
    """The number of ranks of each kind; their product is the number of all."""

    tp: int = 1
    ep: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        """Return the number of all ranks."""
        return self.tp * self.ep * self.pp


def plan(cfg: Config, tp: int = 1, ep: int = 1, pp: int = 1) -> Layout:
    """Return the layout; if the model cannot be cut so, InputError names obstacle and nearest size."""
    chosen: dict[str, int] = {}
    for name, value in {"tp": tp, "ep": ep, "pp": pp}.items():
        if why := next(obstacles(cfg, **chosen, **{name: value}), ""):
            free = (v for v in range(1, 4097) if not any(obstacles(cfg, **chosen, **{name: v})))
            nearest = min(free, key=lambda v: abs(v - value))
            raise InputError(f"{name} = {value} is not possible: {why}; the nearest possible: {nearest}")
        chosen[name] = value
    return Layout(**chosen)


def obstacles(c: Config, tp: int = 1, ep: int = 1, pp: int = 1) -> Iterator[str]:
    """Yield a sentence for each obstacle to a layout."""
    if min(tp, ep, pp) < 1:
        yield "it is not a positive number"
        return
    kinds, count = c.layers + c.mtp_layers, len(c.layers)
    for kind, heads, groups in (
        ("M", "mamba_num_heads", "n_groups"),
        ("*", "num_attention_heads", "num_key_value_heads"),
    ):
        many, few = getattr(c, heads), getattr(c, groups)
        if kind in kinds and many % tp:
            yield f"{heads} = {many} is not a multiple of {tp}"
        if kind in kinds and few % tp and tp % few:
            yield f"{groups} = {few} is neither a multiple nor a divisor of {tp}"
    if ep > 1 and c.n_routed_experts < ep:
        yield f"n_routed_experts = {c.n_routed_experts} is less than {ep}"
    for there, key, parts in (
        (True, "vocab_size", tp),
        (c.mtp_layers, "hidden_size", tp),
        ("-" in kinds, "intermediate_size", tp),
        ("E" in kinds, "moe_intermediate_size", tp),
        ("E" in kinds, "moe_shared_expert_intermediate_size", tp),
    ):
        width = getattr(c, key)
        if there and width // unit(width) < parts:
            yield f"{key} = {width} cannot be split into {parts} parts" + " of 16 or more" * (unit(width) > 1)
    if pp > count:
        yield f"there are {count} layers for {pp} stages"


def span(size: int, parts: int, i: int, unit: int = 1) -> range:
    """Return part i of `size`, in whole units; if units are fewer than parts, several parts share one."""
    start, stop = (size // unit * j // parts * unit for j in (i, i + 1))
    return range(start, min(size, max(start + unit, stop)))


def unit(width: int) -> int:
    """Return 16 for a width of whole blocks of packed weights, which is cut between them; else 1."""
    return 16 if width % 16 == 0 else 1

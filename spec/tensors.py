"""Chapter 3. The tensor table: every tensor of a checkpoint, in order, from the configuration alone.

One function, `table`, lists the name and the shape of each tensor, its layer, how it is divided between ranks
(chapter 21) and whether a quantization recipe may change it. The loader validates files against this table,
`inspect` counts with it, and test checkpoints are written from it. Its totals are the published ones
(docs/model.md, "Parameters"). A layer is a norm and a *mixer*: Mamba-2, attention, experts or an MLP. The
*trunk* is the model without the prediction head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

from refengine.spec.config import Config


class Tensor(NamedTuple):
    """Holds one row of the table.

    name       in the checkpoint: `backbone.layers.3.mixer.in_proj.weight`
    block      the part of the model it belongs to: `layers.3`, `mtp.layers.0`, or "" for the outermost
    key        the rest of its name, within the block: `mixer.in_proj.weight`
    role       what it is counted as: embedding, lm_head, norm, mamba, conv, ssm (A_log, D, dt_bias),
               attention, router, routed_expert, shared_expert, latent, mlp, mtp_proj
    group      tensors with the same (block, group) are placed together: q|k|v, the experts of a layer
    cut        across ranks (chapter 21): whole, rows, columns, z|x|B|C|dt, x|B|C, heads, inner,
               inner_columns, q_heads, q_columns, kv_heads, expert_rows, expert_columns, shared_rows,
               shared_columns, vocab
    precision  matrix (a recipe may quantize it), table (embedding and head), or small (never quantized)
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: str
    key: str
    role: str
    group: str
    cut: str
    precision: str

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def layer(self) -> int | None:
        """Return the index within the trunk or the prediction head; None for the outermost tensors."""
        return int(self.block.rsplit(".", 1)[1]) if self.block else None


def table(cfg: Config) -> list[Tensor]:
    """Return all tensors, in the order of the computation; names as in the released checkpoints."""
    v, d = cfg.vocab_size, cfg.hidden_size
    rows = [_row("backbone.", "", "embeddings.weight", (v, d), "embedding", "vocab", "table")]
    for i, kind in enumerate(cfg.layers):
        rows += _layer("backbone.", f"layers.{i}", kind, cfg)
    rows += [_row("backbone.", "", "norm_f.weight", (d,), "norm", "whole", "small")]
    if not cfg.tie_word_embeddings:
        rows += [_row("", "", "lm_head.weight", (v, d), "lm_head", "vocab", "table")]
    for i, kind in enumerate(cfg.mtp_layers):
        block = f"mtp.layers.{i}"
        if i == 0:
            rows += [_row("", block, "enorm.weight", (d,), "norm", "whole", "small")]
            rows += [_row("", block, "hnorm.weight", (d,), "norm", "whole", "small")]
            rows += [_row("", block, "eh_proj.weight", (d, 2 * d), "mtp_proj", "rows", "matrix")]
        rows += _layer("", block, kind, cfg)
        if i == len(cfg.mtp_layers) - 1:
            rows += [_row("", block, "final_layernorm.weight", (d,), "norm", "whole", "small")]
    return rows


def _layer(prefix: str, block: str, kind: str, cfg: Config) -> list[Tensor]:
    """Return the pre-norm of a layer, and its mixer."""
    mixer = {"M": _mamba, "*": _attention, "E": _experts, "-": _mlp}[kind](cfg)
    norm = _row(prefix, block, "norm.weight", (cfg.hidden_size,), "norm", "whole", "small")
    return [norm] + [_row(prefix, block, "mixer." + key, *rest) for key, *rest in mixer]


def _mamba(c: Config):
    d, heads, inner = c.hidden_size, (c.mamba_num_heads,), c.mamba_inner
    yield "in_proj.weight", (sum(c.in_proj_widths), d), "mamba", "z|x|B|C|dt", "matrix"
    yield "conv1d.weight", (c.conv_dim, 1, c.conv_kernel), "conv", "x|B|C", "small"
    yield "conv1d.bias", (c.conv_dim,), "conv", "x|B|C", "small"
    for key in ("A_log", "D", "dt_bias"):
        yield key, heads, "ssm", "heads", "small"
    yield "norm.weight", (inner,), "norm", "inner", "small"
    yield "out_proj.weight", (d, inner), "mamba", "inner_columns", "matrix"


def _attention(c: Config):
    d, (q, k, v) = c.hidden_size, c.qkv_widths
    for key, width, cut in (("q_proj", q, "q_heads"), ("k_proj", k, "kv_heads"), ("v_proj", v, "kv_heads")):
        yield f"{key}.weight", (width, d), "attention", cut, "matrix", "qkv_proj"
    yield "o_proj.weight", (d, q), "attention", "q_columns", "matrix"


def _experts(c: Config):
    d, x, i, s = c.hidden_size, c.expert_width, c.moe_intermediate_size, c.moe_shared_expert_intermediate_size
    yield "gate.weight", (c.n_routed_experts, d), "router", "whole", "small"
    yield "gate.e_score_correction_bias", (c.n_routed_experts,), "router", "whole", "small", None, "F32"
    if c.moe_latent_size:
        yield "fc1_latent_proj.weight", (x, d), "latent", "whole", "matrix"
    for e in range(c.n_routed_experts):
        yield f"experts.{e}.up_proj.weight", (i, x), "routed_expert", "expert_rows", "matrix", "experts"
        yield f"experts.{e}.down_proj.weight", (x, i), "routed_expert", "expert_columns", "matrix", "experts"
    if c.moe_latent_size:
        yield "fc2_latent_proj.weight", (d, x), "latent", "whole", "matrix"
    yield "shared_experts.up_proj.weight", (s, d), "shared_expert", "shared_rows", "matrix"
    yield "shared_experts.down_proj.weight", (d, s), "shared_expert", "shared_columns", "matrix"


def _mlp(c: Config):
    d, f = c.hidden_size, c.intermediate_size
    yield "up_proj.weight", (f, d), "mlp", "rows", "matrix"
    yield "down_proj.weight", (d, f), "mlp", "columns", "matrix"


def _row(prefix, block, key, shape, role, cut, precision, group=None, dtype="BF16") -> Tensor:
    name = prefix + (f"{block}.{key}" if block else key)
    return Tensor(name, shape, dtype, block, key, role, group or key.removeprefix("mixer."), cut, precision)


def parameters(rows: Iterable[Tensor]) -> int:
    """Return the number of elements of all rows."""
    return sum(row.size for row in rows)


def active_parameters(cfg: Config) -> int:
    """Return the parameters of the trunk that one token uses, without the embedding table and the head."""
    total = 0.0
    for row in table(cfg):
        if row.block.startswith("layers."):
            share = cfg.num_experts_per_tok / cfg.n_routed_experts if row.role == "routed_expert" else 1
            total += row.size * share
        elif row.key == "norm_f.weight":
            total += row.size
    return round(total)


class Group(NamedTuple):
    """Holds the tensors that a backend places together."""

    block: str
    in_mixer: bool
    name: str
    rows: list[Tensor]


def groups(rows: Iterable[Tensor]) -> list[Group]:
    """Return the table cut into groups, in order."""
    by = groupby(rows, key=lambda row: (row.block, row.key.startswith("mixer."), row.group))
    return [Group(*key, list(members)) for key, members in by]


def placed(rows: Iterable[Tensor], place: Callable[[Group], Any]) -> dict[str, dict[str, Any]]:
    """Return the weights as the model reads them, as in weights["layers.3"]["mixer"]["in_proj.weight"]."""
    weights: dict[str, dict[str, Any]] = {}
    for group in groups(rows):
        block = weights.setdefault(group.block, {})
        (block.setdefault("mixer", {}) if group.in_mixer else block)[group.name] = place(group)
    return weights

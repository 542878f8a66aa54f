"""The sizes of one call of the model, and what a kernel that it needs is counted in: bytes and operations.

Weights are counted from the tensor table; matrices and activations are bfloat16, small tensors and the state
S float32. Experts are chosen evenly, by each token for itself.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from refengine.spec.config import Config
from refengine.spec.tensors import Tensor, table

ACTIVATION, FLOAT = 2, 4  # bytes


class Work(NamedTuple):
    """One call of a kernel, or of a few in a row."""

    kernel: str
    what: str
    calls: int
    launches: int
    held: float  # bytes of the model and its memory: weights, S and tails, keys and values
    passing: float  # bytes of activations, and of what kernels hand to each other
    flops: float
    unit: str  # cuBLAS, mma (our own products of bfloat16), or float32

    @property
    def bytes(self) -> float:
        """Return all bytes of one call."""
        return self.held + self.passing


def weight_bytes(rows: list[Tensor]) -> int:
    """Return the bytes of these tensors on the device."""
    return sum(row.size * (FLOAT if row.precision == "small" else ACTIVATION) for row in rows)


def state_bytes(cfg: Config) -> int:
    """Return the bytes of S and the tails of one sequence, whatever its length."""
    S = cfg.mamba_inner * cfg.ssm_state_size * FLOAT
    return cfg.layers.count("M") * (S + cfg.conv_dim * (cfg.conv_kernel - 1) * ACTIVATION)


def cache_bytes(cfg: Config) -> int:
    """Return the bytes of the keys and values of a token."""
    return cfg.layers.count("*") * sum(cfg.qkv_widths[1:]) * ACTIVATION


def chosen(cfg: Config, tokens: int) -> float:
    """Return the mean number of different experts that so many tokens select."""
    missed = 1 - cfg.num_experts_per_tok / cfg.n_routed_experts
    return cfg.n_routed_experts * (1 - missed**tokens)


@cache
def trunk(cfg: Config) -> list[Tensor]:
    """Return the tensor table without the prediction head."""
    return [row for row in table(cfg) if not row.block.startswith("mtp.")]


@cache
def examples(cfg: Config) -> dict[str, list[Tensor]]:
    """Return the tensors of the first layer of each kind, and under "" those outside of the layers."""
    blocks = {f"layers.{cfg.layers.index(kind)}": kind for kind in set(cfg.layers)} | {"": ""}
    found: dict[str, list[Tensor]] = {kind: [] for kind in blocks.values()}
    for row in trunk(cfg):
        if row.block in blocks:
            found[blocks[row.block]].append(row)
    return found


class Call(NamedTuple):
    """The sizes of one call."""

    cfg: Config
    batch: int
    length: int
    context: int

    @property
    def tokens(self) -> int:
        """Return the number of new positions."""
        return self.batch * self.length

    def rows(self, kind: str, *keys: str) -> list[Tensor]:
        """Return the tensors of such a layer whose key begins so."""
        keys = tuple(("mixer." if kind else "") + key for key in keys)
        return [row for row in examples(self.cfg)[kind] if row.key.startswith(keys)]

    def matrix(self, what: str, kind: str, *keys: str) -> Work:
        """Return a product by cuBLAS: matrices one below the other times every token."""
        rows = self.rows(kind, *keys)
        outputs, inputs = sum(row.shape[0] for row in rows), rows[0].shape[1]
        return self.one(
            kind,
            "cuBLAS",
            what,
            held=weight_bytes(rows),
            unit="cuBLAS",
            passing=self.tokens * (inputs + outputs) * ACTIVATION,
            flops=2 * self.tokens * sum(row.size for row in rows),
        )

    def one(self, kind, kernel, what, held=0.0, passing=0.0, flops=0.0, unit="float32", launches=1) -> Work:
        """Return the kernel, once in each layer of this kind."""
        calls = self.cfg.layers.count(kind) if kind else 1
        return Work(kernel, what, calls, launches, held, passing, flops, unit)

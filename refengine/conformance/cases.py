"""Seeded cases: sizes of a small model, filled by a seeded generator, and the test of agreement.

A `Case` is a handful of small numbers; its repr, which a failing check prints, runs it again. Axes that meet
in an array are drawn from menus without a common member, so no two can be confused. Hypothesis draws cases by
`refengine.conformance.strategies`; this module does not need it.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config
from refengine.spec.numerics import tolerance
from refengine.spec.tensors import Tensor, table

MENUS = {
    "hidden_size": (26, 28),
    "n_groups": (1, 2, 8), "heads_per_group": (1, 3), "mamba_head_dim": (7, 9), "ssm_state_size": (4, 5),
    "conv_kernel": (4, 2, 3), "chunk_size": (11, 1, 2, 16, 64),
    "attention": ((6, 2), (6, 3), (5, 1)), "head_dim": (10, 12),
    "n_routed_experts": (9, 12), "num_experts_per_tok": (4, 1, 6), "moe_latent_size": (20, None),
    "n_group": (1, 3), "norm_topk_prob": (True, False),
    "layer_norm_epsilon": (1e-5, 3e-3), "routed_scaling_factor": (2.5, 0.7),
}  # fmt: skip


MEASURED: ContextVar[list | None] = ContextVar("(error, dtype) of each comparison by agree", default=None)


@dataclass(frozen=True, kw_only=True, repr=False)
class Case:
    """A model of these layers and sizes, with random weights, and `batch` sequences of `length` tokens."""

    layers: str = "M*E-"
    mtp_layers: str = ""
    seed: int = 0
    batch: int = 2
    length: int = 17
    hidden_size: int = 26
    n_groups: int = 2
    heads_per_group: int = 3
    mamba_head_dim: int = 7
    ssm_state_size: int = 5
    conv_kernel: int = 4
    chunk_size: int = 11
    attention: tuple[int, int] = (6, 2)
    head_dim: int = 10
    n_routed_experts: int = 9
    num_experts_per_tok: int = 4
    moe_latent_size: int | None = 20
    n_group: int = 1
    norm_topk_prob: bool = True
    layer_norm_epsilon: float = 1e-5
    routed_scaling_factor: float = 2.5
    tied: bool = False
    disk: str = "BF16"

    def __repr__(self) -> str:
        """Return one line of code that makes this case: the fields that differ from the defaults."""
        told = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in told)})"

    def _repr_pretty_(self, printer, cycle):
        """Print the repr where Hypothesis would print all fields."""
        printer.text(repr(self))

    @cached_property
    def cfg(self) -> Config:
        """Return the configuration of the model."""
        drawn = {key: getattr(self, key) for key in MENUS if key not in ("heads_per_group", "attention")}
        heads, kv = self.attention
        return Config.from_hf(
            drawn
            | {
                "model_type": "nemotron_h",
                "hybrid_override_pattern": self.layers,
                "vocab_size": 61,
                "max_position_embeddings": 512,
                "tie_word_embeddings": self.tied,
                "mamba_num_heads": self.n_groups * self.heads_per_group,
                "num_attention_heads": heads,
                "num_key_value_heads": kv,
                "moe_intermediate_size": 13,
                "moe_shared_expert_intermediate_size": 17,
                "intermediate_size": 31,
                "topk_group": 2 if self.n_group > 1 else 1,
                "num_nextn_predict_layers": int(bool(self.mtp_layers)),
                "mtp_hybrid_override_pattern": self.mtp_layers,
            }
        )

    def rng(self, *what: int) -> np.random.Generator:
        """Return a generator of random numbers; `what` names one of several streams of a case."""
        return np.random.default_rng([self.seed, *what])

    def normal(self, what: int, *shape: int) -> np.ndarray:
        """Return activations of size 1, float64 but exact in float32; `what` names one of several arrays."""
        return self.rng(2, what).standard_normal(shape).astype(np.float32).astype(np.float64)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor by its name in the checkpoint, in the file's dtype."""
        return random_tensors(self.cfg, self.seed, self.disk)[name]

    def exact(self, key: str, block: str = "layers.0") -> np.ndarray:
        """Return a weight of one mixer, in float64."""
        prefix = "" if block.startswith("mtp.") else "backbone."
        return self.read(f"{prefix}{block}.mixer.{key}").astype(np.float64)

    @property
    def ids(self) -> np.ndarray:
        """Return the token ids of the sequences, [batch length]."""
        return self.rng(1).integers(0, self.cfg.vocab_size, (self.batch, self.length))

    @property
    def lengths(self) -> np.ndarray:
        """Return how many tokens of each row are real, [batch]; at least one row is full."""
        n = self.rng(3).integers(0, self.length + 1, self.batch)
        n[self.seed % self.batch] = self.length
        return n


@lru_cache(maxsize=64)
def random_tensors(cfg: Config, seed: int, disk: str = "BF16") -> dict[str, np.ndarray]:
    """Return tensors by name; values by role, about as large as in a trained model, and every one matters."""
    rng = np.random.default_rng([seed, 0])
    return {
        row.name: random_tensor(row, rng).astype(DTYPES["F32" if row.dtype == "F32" else disk])
        for row in table(cfg)
    }


def random_tensor(row: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Return random values for one tensor of the table, float64."""
    match row.key.removeprefix("mixer."):
        case "A_log":
            return np.log(rng.uniform(1, 16, row.shape))
        case "dt_bias":  # softplus of it spans 0.0003 .. 1.3
            return rng.uniform(-8, 1, row.shape)
        case "gate.e_score_correction_bias" | "conv1d.bias":
            return 0.1 * rng.standard_normal(row.shape)
        case "embeddings.weight":
            return rng.standard_normal(row.shape)
        case _ if len(row.shape) == 1:
            return 1 + 0.2 * rng.standard_normal(row.shape)
        case _:
            return 1.5 * rng.standard_normal(row.shape) / math.sqrt(row.shape[-1])


def cut(case: Case, cuts) -> list[slice]:
    """Return the positions of a case in consecutive pieces; any numbers may be the cuts."""
    ends = sorted({0, case.length} | {c % case.length for c in cuts})
    return [slice(a, b) for a, b in pairwise(ends)]


def terms(cfg: Config, length: int) -> int:
    """Return how many products a logit may be a sum of: a row of each matrix on its way, and positions."""
    per_row: dict[tuple[str, str], int] = {}
    for row in table(cfg):
        if row.precision != "small":
            per_row[row.block, row.role] = max(row.shape[-1], per_row.get((row.block, row.role), 0))
    return sum(per_row.values()) + length * sum(kind in "M*" for kind in cfg.layers)


def agree(actual, expected, dtype, terms: int, what: str = "", stretch: float = 1.0) -> float:
    """Return the relative error; AssertionError if it exceeds the rounding of a sum of `terms` products.

    The products are of numbers about as large as the largest of `expected`, or 1. `stretch`: by how much a
    division enlarged the rounding of what it divided.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    what = what and f"{what}: "
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}shape {actual.shape} for {expected.shape}")
    if not expected.size:
        return 0.0
    error = np.abs(actual - expected) / max(1.0, np.abs(expected).max())
    worst, allowed = error.max(), tolerance(dtype, terms) * stretch
    if (seen := MEASURED.get()) is not None:
        seen.append((float(worst), dtype))
    if not worst <= allowed:
        where = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
        value = actual[where]
        if not np.isfinite(value) and np.isfinite(expected[where]):
            held = "NaN" if np.isnan(value) else "an infinite number"
            raise AssertionError(f"{what}{held} at {where}, where {expected[where]:.3g} is right")
        raise AssertionError(f"{what}off by {worst:.3g} at {where}; {dtype} is allowed {allowed:.3g}")
    return float(worst)


def __getattr__(name: str):
    """Import the strategies, which need Hypothesis, when they are first asked for."""
    if name in ("ANY_LAYERS", "CUTS", "cases"):
        from refengine.conformance import strategies

        return getattr(strategies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

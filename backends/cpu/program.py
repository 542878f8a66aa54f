"""Fill the structures of addresses and sizes from which kernels/mixers.cpp reads a model."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import NamedTuple

from refengine.backends.cpu.arrays import address, in_order, kind_of
from refengine.backends.cpu.arrays import matrix as described
from refengine.backends.cpu.interface import STRUCTURES, filled

MOST = 3e38  # used for infinity
NONE = filled("Matrix", None, 0, None, 1.0)  # instead of a matrix
LOG2E = math.log2(math.e)


class Unknown(Exception):
    """Raised for a model that the loops cannot serve."""


class Program(NamedTuple):
    """The structures of one model, for its steps."""

    kinds: str
    whole: ctypes.Structure
    kept: tuple  # arrays that the structures point to, kept alive
    recorded: list[int]  # numbers of a record for one position, of each layer


def compiled(model, alone: bool = True) -> Program | None:
    """Return the program of a model, or None if the loops cannot serve it; without the head for a rank.

    A rank has a part of every matrix, so widths come from the arrays.
    """
    cfg = model.cfg
    blocks = [model.weights[f"layers.{i}"] for i in range(len(cfg.layers))]
    return of_layers(model, cfg.layers, blocks, model.weights[""]["norm_f.weight"], alone)


def compiled_head(model) -> Program | None:
    """Return the program of the prediction head, or None if the loops cannot serve it."""
    kinds = model.cfg.mtp_layers
    blocks = [model.weights.get(f"mtp.layers.{i}", {}) for i in range(len(kinds))]
    if not kinds or "final_layernorm.weight" not in blocks[-1]:
        return None
    return of_layers(model, kinds, blocks, blocks[-1]["final_layernorm.weight"])


def of_layers(model, kinds: str, blocks: list, last_norm, alone: bool = True) -> Program | None:
    """Return the program of some layers, the norm after them, and the output layer."""
    cfg, top = model.cfg, model.weights[""]
    head = top["embeddings.weight" if cfg.tie_word_embeddings else "lm_head.weight"]
    try:
        parts = [LAYERS[kind](cfg, w, w["mixer"]) for kind, w in zip(kinds, blocks, strict=True)]
        final = vector(last_norm), cfg.hidden_size, cfg.layer_norm_epsilon
        last = (matrix(head), len(head)) if alone else (NONE, 0)
    except Unknown:
        return None
    listed = [
        filled("Layer", ord(kind), ctypes.addressof(part)) for kind, part in zip(kinds, parts, strict=True)
    ]
    layers = (STRUCTURES["Layer"] * len(parts))(*listed)
    whole = filled("Model", final, *last, len(parts), ctypes.addressof(layers))
    recorded = [RECORDED[kind](cfg) if kind in RECORDED else 0 for kind in kinds]
    return Program(kinds, whole, (parts, layers), recorded)


def matrix(weight) -> ctypes.Structure:
    """Return the structure of a matrix; raise Unknown if the loops cannot read it."""
    try:
        return described(weight)
    except (AttributeError, TypeError):
        raise Unknown from None


def vector(weight) -> int | None:
    """Return the address of a small weight, as contiguous float32."""
    if kind_of(weight) != 0 or not in_order(weight):
        raise Unknown
    return address(weight)


def taps(weight) -> int | None:
    """Return the address of a convolution's weight, with the channels of one tap contiguous.

    The weight is k c or c 1 k.
    """
    return vector(weight if weight.ndim == 2 else weight.permute(2, 1, 0))


def norm(cfg, w) -> tuple:
    """Return the fields of a layer's norm."""
    return vector(w["norm.weight"]), cfg.hidden_size, cfg.layer_norm_epsilon


def mamba(cfg, w, m) -> ctypes.Structure:
    """Return the structure of a Mamba layer."""
    low, high = cfg.time_step_limit
    return filled(
        "Mamba",
        norm(cfg, w),
        matrix(m["in_proj.weight"]),
        matrix(m["out_proj.weight"]),
        taps(m["conv1d.weight"]),
        *(vector(m[key]) for key in ("conv1d.bias", "A_log", "D", "dt_bias", "norm.weight")),
        cfg.mamba_num_heads,
        cfg.mamba_head_dim,
        cfg.n_groups,
        cfg.ssm_state_size,
        cfg.conv_kernel,
        low,
        min(high, MOST),
    )


def attention(cfg, w, m) -> ctypes.Structure:
    """Return the structure of an attention layer."""
    qkv = m["qkv_proj"]
    parts = qkv if isinstance(qkv, tuple) else qkv.split(cfg.qkv_widths)  # a tensor
    return filled(
        "Attention",
        norm(cfg, w),
        *map(matrix, parts),
        matrix(m["o_proj.weight"]),
        cfg.num_attention_heads,
        cfg.num_key_value_heads,
        cfg.head_dim,
        LOG2E / math.sqrt(cfg.head_dim),
    )


def experts(cfg, w, m) -> ctypes.Structure:
    """Return the structure of a layer of experts."""
    listed = m["experts"]
    if not getattr(listed, "readable", False):
        raise Unknown
    latent, shared = cfg.moe_latent_size, m["shared_experts.up_proj.weight"]
    fc1, fc2 = (matrix(m[f"{key}_latent_proj.weight"]) if latent else NONE for key in ("fc1", "fc2"))
    return filled(
        "Experts",
        norm(cfg, w),
        vector(m["gate.weight"]),
        vector(m["gate.e_score_correction_bias"]),
        matrix(shared),
        matrix(m["shared_experts.down_proj.weight"]),
        fc1,
        fc2,
        *listed.places,
        cfg.n_routed_experts,
        cfg.num_experts_per_tok,
        cfg.n_group,
        cfg.topk_group,
        len(listed.matrices[0][0]),
        len(shared),
        latent or 0,
        cfg.norm_topk_prob,
        cfg.routed_scaling_factor,
    )


def dense(cfg, w, m) -> ctypes.Structure:
    """Return the structure of a dense layer."""
    up = m["up_proj.weight"]
    return filled("Dense", norm(cfg, w), matrix(up), matrix(m["down_proj.weight"]), len(up))


RECORDED: dict[str, Callable] = {
    "M": lambda cfg: 2 * cfg.conv_dim + cfg.mamba_num_heads,  # x|B|C before and after the convolution, dt
    "*": lambda cfg: 2 * cfg.num_key_value_heads * cfg.head_dim,
}
LAYERS = {"M": mamba, "*": attention, "E": experts, "-": dense}

"""Checkpoints with packed weights, written from random ones: sizes are multiples of 16, as modelopt asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import Piece, pieces, write_pieces
from refengine.conformance.cases import Case
from refengine.spec.config import Config
from refengine.spec.quant import TOP_W4A8, Packed, fp8, mxfp8, nvfp4
from refengine.spec.tensors import Tensor, table

CFG = replace(
    Case(
        layers="M*E-", mtp_layers="*E", hidden_size=64, mamba_head_dim=16, head_dim=16, moe_latent_size=32
    ).cfg,
    moe_intermediate_size=96, intermediate_size=160, moe_shared_expert_intermediate_size=192, vocab_size=128,
)  # fmt: skip
FORMATS: dict[str, Callable] = {
    "NVFP4": nvfp4,
    "four over six": lambda w: nvfp4(w, four_over_six=True),
    "W4A8": lambda w: nvfp4(w, block=32, top=TOP_W4A8),
    "FP8": fp8,
    "MXFP8": mxfp8,
}


def mixed(row: Tensor) -> str | None:
    """Return a format for a row, as Ultra's files have it, with two more kinds: MTP stays plain."""
    if row.precision == "small" or row.block.startswith("mtp.") or row.role == "embedding":
        return None
    by_role = {"routed_expert": "four over six", "shared_expert": "FP8", "mamba": "FP8", "mlp": "MXFP8"}
    return by_role.get(row.role) or {"latent": "W4A8", "lm_head": "NVFP4"}.get(row.role)


def all_in(name: str) -> Callable[[Tensor], str | None]:
    """Return a choice of one format for every matrix."""
    return lambda row: None if row.precision == "small" else name


def weights(cfg: Config, choose: Callable[[Tensor], str | None], seed: int = 0) -> dict[str, object]:
    """Return the tensors of a random model by name, packed as chosen."""
    values = random_values(cfg, seed)

    def of(row: Tensor):
        plain, name = values(row), choose(row)
        plain = plain if row.dtype == "F32" else plain.astype(ml_dtypes.bfloat16)
        return FORMATS[name](plain) if name else plain

    return {row.name: of(row) for row in table(cfg)}


def packed_pieces(name: str, weight: Packed) -> list[Piece]:
    """Return the tensors of a packed weight called `name`, in the layout of modelopt."""
    base = name.removesuffix(".weight")
    wide = weight.kind == "NVFP4"
    out = [Piece(name, "U8" if wide else "F8_E4M3", weight.codes.shape, lambda: weight.codes)]
    scale = {"NVFP4": "F8_E4M3", "FP8": "F32", "MXFP8": "U8"}[weight.kind]
    out += [Piece(f"{base}.weight_scale", scale, weight.scale.shape, lambda: weight.scale)]
    for end, value in (("weight_scale_2", weight.scale_2), ("input_scale", weight.input_scale)):
        if value is not None:
            out += [Piece(f"{base}.{end}", "F32", (), lambda value=value: np.array(value, np.float32))]
    return out


def packed_checkpoint(directory: Path, choose=mixed, cfg: Config = CFG, seed: int = 0) -> Path:
    """Write a random model, packed as chosen, into a directory and return it."""
    made = weights(cfg, choose, seed)
    plain = pieces(cfg, lambda row: made[row.name])
    out = []
    for piece in plain:
        weight = made[piece.name]
        out += packed_pieces(piece.name, weight) if isinstance(weight, Packed) else [piece]
    write_pieces(directory, cfg.to_hf(), out)
    return directory

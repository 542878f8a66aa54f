"""Names of tensors in GGUF files <-> in the tensor table, and the changes that llama.cpp's converter makes.

    ssm_a          A = -exp(A_log), from which A_log is computed
    attn_q attn_k  the halves of each head are interleaved row by row; the order is restored
    ssm_norm       cut in groups; ssm_a, ssm_d, ssm_conv1d have an axis of size one more or less
    nextn.*        with attn_* and ffn_* of the same block: both layers of the prediction head

Small tensors are returned in a floating-point dtype even where a file packs them.
"""

from __future__ import annotations

import re
from functools import partial
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from refengine.checkpoint.gguf.stored import Altered, AnyInFile, StoredBlocks, scale_of
from refengine.checkpoint.safetensors_file import Stored
from refengine.spec.arrays import Array, Weight, widen
from refengine.spec.config import InputError
from refengine.untrusted import shown

OUTER = {
    "token_embd.weight": "backbone.embeddings.weight",
    "output_norm.weight": "backbone.norm_f.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {  # of blk.N.
    "attn_norm.weight": "norm.weight",
    "ssm_in.weight": "mixer.in_proj.weight",
    "ssm_conv1d.weight": "mixer.conv1d.weight",
    "ssm_conv1d.bias": "mixer.conv1d.bias",
    "ssm_dt.bias": "mixer.dt_bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_norm.weight": "mixer.norm.weight",
    "ssm_out.weight": "mixer.out_proj.weight",
    "attn_q.weight": "mixer.q_proj.weight",
    "attn_k.weight": "mixer.k_proj.weight",
    "attn_v.weight": "mixer.v_proj.weight",
    "attn_output.weight": "mixer.o_proj.weight",
    "ffn_up.weight": "mixer.up_proj.weight",
    "ffn_down.weight": "mixer.down_proj.weight",
    "ffn_gate_inp.weight": "mixer.gate.weight",
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
    "ffn_latent_down.weight": "mixer.fc1_latent_proj.weight",
    "ffn_latent_up.weight": "mixer.fc2_latent_proj.weight",
    "ffn_up_exps.weight": "mixer.experts.up_proj",
    "ffn_down_exps.weight": "mixer.experts.down_proj",
    "ffn_up_shexp.weight": "mixer.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mixer.shared_experts.down_proj.weight",
}
OLD = {"ffn_latent_in": "ffn_latent_down", "ffn_latent_out": "ffn_latent_up"}  # of Ollama's files
HEAD = {  # of the block after the trunk's
    "nextn.enorm.weight": "mtp.layers.0.enorm.weight",
    "nextn.hnorm.weight": "mtp.layers.0.hnorm.weight",
    "nextn.eh_proj.weight": "mtp.layers.0.eh_proj.weight",
    "attn_norm.weight": "mtp.layers.0.norm.weight",
    "post_attention_norm.weight": "mtp.layers.1.norm.weight",
    "nextn.shared_head_norm.weight": "mtp.layers.1.final_layernorm.weight",
}
HEAD |= {
    name: f"mtp.layers.{0 if name.startswith('attn') else 1}.{ours}"
    for name, ours in LAYER.items()
    if name.startswith(("attn_", "ffn_", "exp_")) and name not in HEAD
}
BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)")
SMALL = ("norm.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.dt_bias", "mixer.A_log", "mixer.D",
         "mixer.gate.weight", "mixer.gate.e_score_correction_bias", "norm_f.weight")  # fmt: skip
CLOSE = 2.0**-22  # two float32 numbers that one rounding of exp may turn into each other, relatively


def ours(name: str, trunk: int) -> str | None:
    """Return the table's name of a tensor that a file calls `name`; None for one that it has no name for."""
    if name in OUTER:
        return OUTER[name]
    if not (found := BLOCK.fullmatch(name)):
        return None
    layer, part = int(found[1]), found[2]
    for old, new in OLD.items():
        part = part.replace(old, new)
    if layer >= trunk:
        return HEAD.get(part) if layer == trunk else None
    return f"backbone.layers.{layer}.{LAYER[part]}" if part in LAYER else None


def theirs(name: str, trunk: int) -> str:
    """Return the name in a file of a tensor, or a stack of experts, of the table."""
    for outer, mine in OUTER.items():
        if mine == name:
            return outer
    if name.startswith("mtp."):
        return f"blk.{trunk}." + next(part for part, mine in HEAD.items() if mine == name)
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}." + next(part for part, mine in LAYER.items() if mine == rest)


def by_our_names(tensors: dict[str, AnyInFile], trunk: int, head_dim: int) -> dict[str, Any]:
    """Return the tensors by the names of the table, as the table has them; others by their own names.

    trunk     layers without the prediction head
    head_dim  of the attention; 0 where a model has none
    """
    found: dict[str, Any] = {}
    for name, at in tensors.items():
        stem, _, end = name.rpartition(".")
        if end in ("scale", "input_scale") and f"{stem}.weight" in tensors:  # the other: of packed inputs
            continue
        mine = ours(name, trunk)
        factor = tensors.get(f"{stem}.scale") if end == "weight" else None
        found[mine or name] = restored(_scaled(at, factor), mine, head_dim) if mine else at
    return found


def _scaled(at: AnyInFile, factor: AnyInFile | None) -> AnyInFile | Altered:
    """Return a tensor with its factor, or those of a stack; InputError where they do not fit."""
    if factor is None:
        return at
    each = at.shape[0] if len(at.shape) == 3 else 1
    if not isinstance(factor, Stored) or factor.dtype != "F32" or prod(factor.shape) not in (1, each):
        what = f"{factor.dtype} {shown(list(factor.shape))}, where {shown(at.name)} calls for F32 [{each}]"
        raise InputError(f"{factor.file.path}: the tensor {shown(factor.name)} is {what}")
    if prod(factor.shape) > 1:
        factor = factor._replace(shape=(each,))
    if isinstance(at, StoredBlocks):
        return at._replace(scale=factor)
    if len(at.shape) == 3:
        raise InputError(f"{at.file.path}: {shown(at.name)} is {at.dtype}, and has factors: not supported")
    return Altered(at, "F32", at.shape, lambda value: widen(value, np.float32) * scale_of(factor))


def restored(at: AnyInFile | Altered, name: str, head_dim: int) -> AnyInFile | Altered:
    """Return a tensor of the table, with what the converter did to it undone."""
    if name.endswith((".q_proj.weight", ".k_proj.weight")):
        whole = head_dim > 0 and head_dim % 2 == 0 and at.shape[0] % head_dim == 0
        return Altered(at, at.dtype, at.shape, partial(apart, head_dim=head_dim)) if whole else at
    if name.endswith(".A_log"):
        return Altered(at, "F32", (prod(at.shape),), logarithm)
    shape = (prod(at.shape),) if name.endswith(".mixer.norm.weight") else at.shape
    if isinstance(at, Stored):
        return at._replace(shape=shape)
    if not name.endswith(SMALL):
        return at
    shape = (shape[0], 1, *shape[1:]) if name.endswith(".conv1d.weight") else shape
    return Altered(at, "F32", shape, lambda value: widen(value, np.float32).reshape(shape))


def apart(weight: Weight, head_dim: int) -> Weight:
    """Return q or k with the rows of each head in order, from rows of its halves in turn."""
    rows = np.arange(weight.shape[0]).reshape(-1, head_dim // 2, 2).swapaxes(1, 2)
    return weight[rows.reshape(-1)]


def in_turn(weight: Weight, head_dim: int) -> Weight:
    """Return q or k as files have it: rows of the two halves of each head in turn."""
    rows = np.arange(weight.shape[0]).reshape(-1, 2, head_dim // 2).swapaxes(1, 2)
    return weight[rows.reshape(-1)]


def logarithm(a: Weight) -> Array:
    """Return A_log of A = -exp(A_log): numbers of bfloat16, where A is that of such numbers.

    Releases hold A_log in bfloat16, of which the converter takes exp in float32: then nothing is lost.
    """
    a = -widen(a, np.float32).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exact = np.log(a.astype(np.float64))
        short = exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        lossless = bool((np.abs(np.exp(short.astype(np.float64)) - a) <= CLOSE * np.abs(a)).all())
    return short if lossless else exact.astype(np.float32)

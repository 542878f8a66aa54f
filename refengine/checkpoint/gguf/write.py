"""A model, written as a GGUF file that llama.cpp reads, one tensor at a time.

    f32, bf16   every matrix in it
    q8_0, q4_0  every matrix; the embedding and lm_head of q4_0 in q8_0
    mxfp4       routed experts; other matrices in q8_0
    nvfp4       matrices whose rows are blocks of 64, each with a factor; latent projections, which llama.cpp
                reads without a factor, and the prediction head in bf16; the embedding and lm_head in q8_0

Rows that are no whole blocks fall back from nvfp4 to q8_0, and from any to bf16. Small tensors are float32.
The header is written by the package `gguf`, which packs all but nvfp4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from refengine.checkpoint.gguf.config import HEAD, OF_LAYERS, OWN_CHUNK, SIZES
from refengine.checkpoint.gguf.names import in_turn, theirs
from refengine.checkpoint.gguf.stored import TYPES, Type
from refengine.spec.arrays import Array, Weight, widen
from refengine.spec.config import Config, InputError
from refengine.spec.quant import TOP_4_OVER_6, Packed, nvfp4
from refengine.spec.tensors import Tensor, table

FILE_TYPES = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_0": 2, "mxfp4": 38, "nvfp4": 39}  # general.file_type
BY_NAME = {kind.name: kind for kind in TYPES.values()}


class Piece(NamedTuple):
    """Holds a tensor of the file: its name, shape and type, and a function that makes its bytes."""

    name: str
    shape: tuple[int, ...]
    type: Type
    data: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Return the bytes that the tensor takes."""
        return prod(self.shape) // self.type.columns * self.type.nbytes


def type_of(row: Tensor, kind: str) -> str:
    """Return the type of a tensor in a file of a kind."""
    if row.precision == "small" or kind == "f32":
        return "F32"
    wanted = kind.upper()
    if kind == "nvfp4" and (row.role == "latent" or row.block.startswith("mtp.")):
        return "BF16"
    table_in_four = row.precision == "table" and kind in ("q4_0", "mxfp4", "nvfp4")
    if table_in_four or (kind == "mxfp4" and row.role != "routed_expert"):
        wanted = "Q8_0"
    for name in (wanted, "Q8_0", "BF16"):
        if row.shape[-1] % BY_NAME[name].columns == 0:
            return name
    raise AssertionError


def pieces(cfg: Config, read: Callable[[str], Weight], kind: str) -> Iterator[Piece]:
    """Yield the tensors of a file, in the order of the table; the experts of a layer as stacks."""
    trunk = len(cfg.layers)
    stacks: dict[str, list[Tensor]] = {}
    for row in table(cfg):
        name = row.name
        if row.role == "routed_expert":
            experts, _, matrix, _ = name.rsplit(".", 3)
            name = f"{experts}.{matrix}"
        stacks.setdefault(name, []).append(row)
    for name, rows in stacks.items():
        row, stacked = rows[0], rows[0].role == "routed_expert"
        chosen, to = BY_NAME[type_of(row, kind)], theirs(name, trunk)
        shape = (len(rows), *row.shape) if stacked else shape_of(row, cfg)

        def values(row: Tensor) -> Weight:
            return altered(row, read(row.name), cfg)

        if chosen.name != "NVFP4":

            def data(rows=rows, chosen=chosen, shape=shape) -> Array:
                return np.stack([encoded(values(row), chosen.name) for row in rows]).reshape(*shape[:-1], -1)

            yield Piece(to, shape, chosen, data)
            continue

        def four(rows=rows, shape=shape) -> Array:
            return np.stack([to_blocks(in_nvfp4(values(row))) for row in rows]).reshape(*shape[:-1], -1)

        def factors(rows=rows) -> Array:
            return np.array([factor(values(row)) for row in rows], np.float32)

        yield Piece(to, shape, chosen, four)
        yield Piece(to.removesuffix("weight") + "scale", (len(rows),), BY_NAME["F32"], factors)


def shape_of(row: Tensor, cfg: Config) -> tuple[int, ...]:
    """Return the shape of a tensor in a file."""
    match row.key:
        case "mixer.conv1d.weight":
            return (row.shape[0], row.shape[2])
        case "mixer.A_log" | "mixer.D":
            return (*row.shape, 1)
        case "mixer.norm.weight":
            return (cfg.n_groups, row.size // cfg.n_groups)
    return row.shape


def altered(row: Tensor, value: Weight, cfg: Config) -> Weight:
    """Return a tensor as files have it."""
    if row.key == "mixer.A_log":
        return -np.exp(widen(value, np.float32))
    if row.key in ("mixer.q_proj.weight", "mixer.k_proj.weight") and cfg.head_dim % 2 == 0:
        return in_turn(value, cfg.head_dim)
    return value


def encoded(value: Weight, kind: str) -> Array:
    """Return the bytes of a tensor [.. i] in a type, uint8 [.. bytes-of-a-row]."""
    import gguf

    wide = np.ascontiguousarray(widen(value, np.float32))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return gguf.quants.quantize(wide, gguf.GGMLQuantizationType[kind]).view(np.uint8)


def in_nvfp4(value: Weight) -> Packed:
    """Return a matrix in NVFP4: as it is, if it is packed so; else each block is scaled to 6 or 4."""
    if is_nvfp4(value):
        return value
    return nvfp4(widen(value, np.float32), four_over_six=True)


def factor(value: Weight) -> np.float32:
    """Return the scale_2 of `in_nvfp4(value)`, without the search for the scales of its blocks."""
    if is_nvfp4(value):
        return np.float32(value.scale_2)
    largest = np.max(np.abs(widen(value, np.float32)), initial=0)
    return np.float32(largest) / np.float32(TOP_4_OVER_6) or np.float32(1)


def is_nvfp4(value: Weight) -> TypeGuard[Packed]:
    """Return whether a matrix is packed in NVFP4 with the blocks of GGUF."""
    return isinstance(value, Packed) and value.kind == "NVFP4" and value.block == 16


def to_blocks(w: Packed) -> Array:
    """Return NVFP4 as blocks of GGUF: four scales, then in each 8 bytes columns 0 to 7 below 8 to 15."""
    codes = np.stack([w.codes & 15, w.codes >> 4], axis=-1).reshape(*w.scale.shape, 16)
    if not w.scale_2:
        codes = np.zeros_like(codes)
    codes = (codes[..., :8] | codes[..., 8:] << 4).reshape(*w.shape[:-1], -1, 32)
    scales = (w.scale & 0x7F).reshape(*w.shape[:-1], -1, 4)
    return np.concatenate([scales, codes], axis=-1).reshape(*w.shape[:-1], -1)


def keys_of(cfg: Config, kind: str) -> dict[str, Any]:
    """Return the metadata of a configuration."""
    layers = cfg.layers + ("*" if cfg.mtp_layers else "")  # one block for both layers of the head

    def each(value: int, kinds: str, head: bool) -> list[int]:
        return [value * (letter in kinds) for letter in cfg.layers] + [value] * (
            head and bool(cfg.mtp_layers)
        )

    width = cfg.moe_intermediate_size if "E" in layers + cfg.mtp_layers else cfg.intermediate_size
    found: dict[str, Any] = {key: getattr(cfg, ours, 1) or 0 for ours, key in SIZES.items()}
    found |= {key: getattr(cfg, ours) or 0 for ours, key in OF_LAYERS.items()}
    found |= {
        "block_count": len(layers), "vocab_size": cfg.vocab_size,
        "attention.head_count_kv": each(cfg.num_key_value_heads, "*", True),
        "attention.value_length": cfg.head_dim, "feed_forward_length": each(width, "E-", True),
        "ssm.inner_size": cfg.mamba_inner,
        "attention.layer_norm_rms_epsilon": float(cfg.layer_norm_epsilon),
        "attention.layer_norm_epsilon": float(cfg.layer_norm_epsilon),
    }  # fmt: skip
    if "E" in cfg.layers + cfg.mtp_layers:
        found |= {"expert_weights_norm": cfg.norm_topk_prob}
        found |= {"expert_weights_scale": float(cfg.routed_scaling_factor)}
        found |= {"moe_latent_size": cfg.moe_latent_size} if cfg.moe_latent_size else {}
    else:
        found = {key: value for key, value in found.items() if not key.startswith("expert_")}
    if cfg.mtp_layers:
        found["nextn_predict_layers"] = 1
    arch = architecture(cfg)
    outer = {
        "general.type": "model",
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    outer |= {OWN_CHUNK: cfg.chunk_size} if cfg.chunk_size else {}
    return outer | {f"{arch}.{key}": value for key, value in found.items()}


def architecture(cfg: Config) -> str:
    """Return the name of the architecture; InputError for a model that files have no form for."""
    letters = set(cfg.layers + cfg.mtp_layers)
    if {"E", "-"} <= letters:
        raise InputError(
            "GGUF has no form for a model with both expert and MLP layers: it cannot be converted"
        )
    if cfg.mtp_layers not in ("", HEAD):
        raise InputError(f"GGUF has only prediction heads of the layers {HEAD}, not {cfg.mtp_layers}")
    return "nemotron_h_moe" if "E" in letters else "nemotron_h"


def write_gguf(
    out: Path,
    cfg: Config,
    read: Callable[[str], Weight],
    kind: str,
    texts: dict[str, Any],
    advance: Callable[[int], object] = lambda elements: None,
) -> dict[str, int]:
    """Write a model into a file; return the bytes of its tensors by type.

    texts    more metadata: tokenizer, templates, advice
    advance  is called with the number of elements that were written
    """
    import gguf

    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    partial = out.with_name(f".{out.name}.partial")
    writer = gguf.GGUFWriter(partial, architecture(cfg))
    for key, value in (keys_of(cfg, kind) | texts).items():
        add(writer, key, value)
    made = list(pieces(cfg, read, kind))
    sizes: dict[str, int] = {}
    for piece in made:
        raw = gguf.GGMLQuantizationType[piece.type.name]
        row = piece.shape[-1] // piece.type.columns * piece.type.nbytes
        shape = (*piece.shape[:-1], row)
        writer.add_tensor_info(piece.name, shape, np.dtype(np.uint8), piece.nbytes, raw)
        sizes[piece.type.name] = sizes.get(piece.type.name, 0) + piece.nbytes
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in made:
            data = np.ascontiguousarray(piece.data()).view(np.uint8)
            if data.nbytes != piece.nbytes:
                raise ValueError(f"{piece.name} has {data.nbytes} bytes, not {piece.nbytes}")
            writer.write_tensor_data(data)
            advance(prod(piece.shape))
        writer.close()
        partial.replace(out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return sizes


def add(writer: Any, key: str, value: Any) -> None:
    """Add a key to a file, with the type that llama.cpp reads."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, list(value))

"""A checkpoint whose weights are not here: what its files hold, from config.json and perhaps their index.

The tensor table has every shape, so sizes are known before anything is downloaded or quantized. The index
(model.safetensors.index.json) lists the scales of packed weights, by which their kinds are told:

    X.weight_scale_2               X is NVFP4
    X.weight_scale without it      X is FP8, or MXFP8 where the metadata says so
"""

from __future__ import annotations

import json
from collections.abc import Container
from dataclasses import replace
from math import prod
from pathlib import Path

from refengine.checkpoint.directory import INDEX, Checkpoint, config_json, config_of
from refengine.checkpoint.locate import locate
from refengine.checkpoint.names import canonical
from refengine.checkpoint.packed import Unread
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config, InputError
from refengine.spec.keys import text_model
from refengine.spec.tensors import Tensor, table
from refengine.units import bytes_text
from refengine.untrusted import read_json

PLAIN = {"float32": "F32", "float16": "F16"}  # other dtypes of config.json leave those of the table


def packed_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Return the bytes of codes and scales of a packed matrix; NVFP4 has blocks of 16 (W4A8 has 32)."""
    size = prod(shape)
    return {"NVFP4": size // 2 + size // 16 + 4, "FP8": size + 4, "MXFP8": size + size // 32}[kind]


def opened(model: str | Path) -> Checkpoint:
    """Return a checkpoint to be described: opened where its weights are here, else planned."""
    path = locate(model, weights=False)
    bare = path.suffix == ".json" if path.is_file() else not any(path.glob("*.safetensors"))
    return planned(path) if bare else Checkpoint.open(model)


def planned(path: Path) -> Checkpoint:
    """Return a checkpoint that can be described and not read, of a config.json or the directory that has it.

    Raises InputError where the configuration is wrong.
    """
    directory = path if path.is_dir() else path.parent
    notes = ["no weights are here: their sizes are those of the configuration"]
    outer = config_json(path if path.is_file() else path / "config.json")
    hf = text_model(outer, notes)
    cfg = config_of(path, hf, notes)
    said = json.dumps([part.get("quantization_config") for part in (hf, outer)] + [_quantized(directory)])
    names, total = _index(directory)
    if cfg.mtp_layers and names and not any(name.startswith("mtp.") for name in names):
        notes.append(f"config.json declares a prediction head, but {INDEX} lists no mtp tensors: left out")
        cfg = replace(cfg, mtp_layers="")
    if not names and '"quant_algo": "' in said:
        notes.append(f"the weights are packed, and {INDEX} tells which: download it too, or give --recipe")
    kind = "MXFP8" if '"MXFP8"' in said else "FP8"
    found = of_config(cfg, directory, names, kind)
    size = sum(at.nbytes for at in found.stored.values())
    if total and abs(total - size) > size / 100:
        notes.append(f"{INDEX} says {bytes_text(total)} in all, and the weights here take {bytes_text(size)}")
    return replace(found, notes=tuple(notes))


def of_config(
    cfg: Config, directory: Path = Path(), names: Container[str] = (), kind: str = "FP8"
) -> Checkpoint:
    """Return a checkpoint that can be described and not read, of a configuration.

    names: those of the tensors in the files, by which packed weights are told; kind: of those with one scale
    """
    stored = {row.name: _unread(row, PLAIN.get(cfg.dtype, row.dtype), names, kind) for row in table(cfg)}
    return Checkpoint(directory, cfg, (), stored, ())


def _unread(row: Tensor, dtype: str, names: Container[str], kind: str) -> Unread:
    """Return a row of the table as it lies in files whose tensors have these names."""
    base = row.name.removesuffix(".weight")
    if f"{base}.weight_scale_2" in names:
        return Unread(row.name, "NVFP4", row.shape, packed_bytes(row.shape, "NVFP4"))
    if f"{base}.weight_scale" in names:
        return Unread(row.name, kind, row.shape, packed_bytes(row.shape, kind))
    dtype = row.dtype if row.dtype == "F32" else dtype
    return Unread(row.name, dtype, row.shape, row.size * DTYPES[dtype].itemsize)


def _quantized(directory: Path) -> object:
    """Return what hf_quant_config.json holds, or None; what it says is only a hint."""
    try:
        return read_json(directory / "hf_quant_config.json")
    except InputError:
        return None


def _index(directory: Path) -> tuple[set[str], int]:
    """Return the tensors that the index lists, by the names of the table, and the bytes in sum; or none."""
    if not (directory / INDEX).exists():
        return set(), 0
    index = read_json(directory / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise InputError(f"{directory / INDEX} has no weight_map from tensor names to file names")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return {canonical(name) or name for name in files}, total if type(total) is int and total > 0 else 0

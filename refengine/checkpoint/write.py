"""Write a checkpoint in the Hugging Face layout, one tensor at a time: a model need not fit in memory.

`write` takes the values of each row of the tensor table; `write_sparse` writes the same headers over files
that have their size and no data, for tests that depend on sizes alone; both use `write_pieces`.
Files get their names when all of them are whole, config.json last: a directory never holds half a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refengine.checkpoint.directory import INDEX
from refengine.checkpoint.safetensors_file import BITS
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config, InputError
from refengine.spec.tensors import Tensor, table

ALIGN = 64  # bytes; the data of a file begins on such a border


class Piece(NamedTuple):
    """Holds a tensor of a file: what the header says, and a function that makes its values (None: zeros)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray] | None

    @property
    def nbytes(self) -> int:
        """Return the bytes that the tensor takes."""
        return prod(self.shape) * BITS[self.dtype] // 8


def write(
    directory: str | Path,
    cfg: Config,
    values: Callable[[Tensor], np.ndarray],
    *,
    dtype: str | None = None,
    shards: int = 1,
    prefix: str = "backbone.",
    stacked: bool = False,
) -> None:
    """Write `cfg`, and `values(row)` of every row of its table, rounded to the dtype it is stored in.

    dtype    of every tensor, such as "F32"; None: as the table has them
    shards   into how many files of about equal size; where several, with an index
    prefix   "backbone.", as in the released files, or "model.", as in transformers
    stacked  each layer's experts as one tensor [expert, out, in]
    """
    write_pieces(directory, cfg.to_hf(), pieces(cfg, values, dtype, prefix, stacked), shards)


def write_sparse(directory: str | Path, cfg: Config, *, shards: int = 1) -> None:
    """Write files of the right size, in which every weight is a hole and reads as 0."""
    write_pieces(directory, cfg.to_hf(), pieces(cfg, None), shards)


def pieces(
    cfg: Config,
    values: Callable[[Tensor], np.ndarray] | None,
    dtype: str | None = None,
    prefix: str = "backbone.",
    stacked: bool = False,
) -> list[Piece]:
    """Return the rows of the table as tensors of files."""
    rows_of: dict[str, list[Tensor]] = {}
    for row in table(cfg):
        name = row.name.replace("backbone.", prefix, 1)
        if stacked and row.role == "routed_expert":
            experts, _, matrix, _ = name.rsplit(".", 3)
            name = f"{experts}.{matrix}"
        rows_of.setdefault(name, []).append(row)

    def piece(name: str, rows: list[Tensor]) -> Piece:
        disk = dtype or rows[0].dtype
        stack = stacked and rows[0].role == "routed_expert"

        def made() -> np.ndarray:
            assert values is not None
            arrays = [np.asarray(values(row)).astype(DTYPES[disk], copy=False) for row in rows]
            return np.stack(arrays) if stack else arrays[0]

        return Piece(name, disk, (len(rows), *rows[0].shape) if stack else rows[0].shape, values and made)

    return [piece(name, rows) for name, rows in rows_of.items()]


def write_pieces(directory: str | Path, config: dict, pieces: list[Piece], shards: int = 1) -> None:
    """Write a directory of `config.json` and these tensors, in order, in `shards` files."""
    directory = Path(directory)
    files = _shards(pieces, shards)
    texts = {"config.json": config}
    if len(files) > 1:
        weight_map = {piece.name: name for name, members in files.items() for piece in members}
        total = sum(piece.nbytes for piece in pieces)
        texts = {INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map}} | texts
    directory.mkdir(parents=True, exist_ok=True)
    for name in sorted(os.listdir(directory)):
        if (name.endswith(".safetensors") or name == INDEX) and name not in {*files, *texts}:
            raise InputError(
                f"{directory} holds {name}, which is not part of the model to write: choose another directory"
            )
    partial = {name: directory / f".{name}.partial" for name in [*files, *texts]}
    try:
        for name, members in files.items():
            _write_file(partial[name], members)
        for name, value in texts.items():
            partial[name].write_text(json.dumps(value, indent=2) + "\n")
        for name, path in partial.items():
            path.replace(directory / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _shards(pieces: list[Piece], shards: int) -> dict[str, list[Piece]]:
    """Return {file name: its tensors}: runs of the list, of about equal size."""
    total, before = sum(piece.nbytes for piece in pieces), 0
    runs: dict[int, list[Piece]] = {}
    for piece in pieces:
        runs.setdefault(before * shards // total, []).append(piece)
        before += piece.nbytes
    if len(runs) == 1:
        return {"model.safetensors": pieces}
    return {f"model-{i:05}-of-{len(runs):05}.safetensors": run for i, run in enumerate(runs.values(), 1)}


def _write_file(path: Path, pieces: list[Piece]) -> None:
    """Write one safetensors file; wide dtypes come first, so that every tensor is aligned."""
    pieces = sorted(pieces, key=lambda piece: -BITS[piece.dtype])
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.nbytes
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGN)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for piece in pieces:
            if piece.values is not None:
                file.write(_bytes(piece, piece.values()).data)
        file.truncate(8 + len(raw) + end)


def _bytes(piece: Piece, values: np.ndarray) -> np.ndarray:
    """Return the bytes of a tensor of a file, checked against what its header says."""
    array = np.ascontiguousarray(values).reshape(np.shape(values))  # a scalar stays one
    if array.shape != piece.shape or array.nbytes != piece.nbytes:
        raise ValueError(f"{piece.name} is {array.dtype} {array.shape}, not {piece.dtype} {piece.shape}")
    return array.reshape(-1).view(np.uint8)

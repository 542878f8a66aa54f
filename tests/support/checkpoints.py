"""Write small checkpoints to read, and damage them.

Sizes come from `cases.Case`: no two axes that meet in an array are equal. `parts` splits a safetensors file
into its header and its data, and `join` makes one, also one whose header does not fit its data.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import write
from refengine.conformance.cases import Case
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config, InputError
from refengine.spec.tensors import Tensor

CONFIGS = {
    "mamba": Case(layers="MM").cfg,
    "attention": Case(layers="**").cfg,
    "dense": Case(layers="M-*--MM").cfg,
    "experts": Case(layers="EM", moe_latent_size=None).cfg,
    "latent": Case(layers="ME*E", n_group=3).cfg,
    "head": Case(layers="ME", mtp_layers="*E").cfg,
    "tied": Case(layers="*-", tied=True).cfg,
}


def random_checkpoint(directory: Path, cfg: Config, seed: int = 0, **how) -> Path:
    """Write random weights of `cfg` into a directory and return it; `how` are arguments of `write`."""
    write(directory, cfg, random_values(cfg, seed), **how)
    return directory


def expected(row: Tensor, cfg: Config, seed: int = 0, dtype: str | None = None) -> np.ndarray:
    """Return the values that a random checkpoint holds for this row."""
    return random_values(cfg, seed)(row).astype(DTYPES[dtype or row.dtype])


def parts(path: Path) -> tuple[dict, bytes]:
    """Return the header and the data of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(header, data: bytes) -> bytes:
    """Return the bytes of a safetensors file with this header (JSON text or a value) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def alter(path: Path, change) -> None:
    """Rewrite a safetensors file with the header and data that `change(header, data)` returns."""
    path.write_bytes(join(*change(*parts(path))))


def alter_json(path: Path, **keys) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not None}))


def add(path: Path, name: str, array: np.ndarray, dtype: str) -> None:
    """Add a tensor at the end of a safetensors file."""

    def change(header, data):
        entry = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        return header | {name: entry}, data + array.tobytes()

    alter(path, change)


def rename(path: Path, new_name) -> None:
    """Rename every tensor of a file to `new_name(name)`, or remove it (None)."""

    def change(header, data):
        kept, out = {}, b""
        for name, entry in header.items():
            if name == "__metadata__" or (new := new_name(name)) is None:
                continue
            begin, end = entry["data_offsets"]
            kept[new] = entry | {"data_offsets": [len(out), len(out) + end - begin]}
            out += data[begin:end]
        return kept, out

    alter(path, change)


def refusal(model) -> str:
    """Return the one sentence with which opening is refused."""
    with pytest.raises(InputError) as refused:
        Checkpoint.open(model)
    sentence = str(refused.value)
    assert 20 < len(sentence) < 600 and sentence.splitlines() == [sentence]
    return sentence

"""GGUF files to read and to damage: `gguf_bytes` writes any header, also one that does not fit the data."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refengine.checkpoint.gguf.stored import TYPES
from refengine.spec.blocks import FORMATS, Blocks

HALVES = {  # where the float16 numbers of a block are
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q4_1": (0, 2),
    "q5_1": (0, 2), "mxfp4": (), "nvfp4": (),
}  # fmt: skip
NUMBER = {name: number for number, (name, *_) in TYPES.items()}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10


def random_blocks(kind: str, size: tuple[int, int], scale=None, seed: int = 0) -> Blocks:
    """Return (rows, blocks of a row) of random bytes; the float16 numbers in them are about 1."""
    rng, form = np.random.default_rng(seed), FORMATS[kind]
    raw = rng.integers(0, 256, (prod(size), form.nbytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        raw[:, at : at + 2] = rng.standard_normal((len(raw), 1)).astype(np.float16).view(np.uint8)
    if kind == "mxfp4":
        raw[:, 0] = rng.integers(100, 140, len(raw))
    if kind == "nvfp4":
        raw[:, :4] &= 0x7F
    return Blocks(form, raw.reshape(size[0], -1), scale)


class Entry(NamedTuple):
    """The header's entry of a tensor: dims with the fastest first, the number of a type, an offset."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int


def text(value: str | bytes) -> bytes:
    """Return a string in the encoding of GGUF files."""
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: Any) -> bytes:
    """Return a value with its type."""
    match value:
        case bytes():  # a value that is encoded already
            return value
        case bool():
            return struct.pack("<IB", BOOL, value)
        case int():
            return struct.pack("<Ii", INT32, value) if value < 0 else struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + text(value)
        case list() if value and isinstance(value[0], (str, bytes)):
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(text, value))
        case _:
            raw = np.asarray(value, np.int32)
            return struct.pack("<IIQ", ARRAY, INT32, len(raw)) + raw.tobytes()


def gguf_bytes(metadata: dict[str, Any], entries: list[Entry], data: bytes = b"", align: int = 32) -> bytes:
    """Return the bytes of a file with this header and this data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata))
    head += b"".join(text(key) + value_bytes(value) for key, value in metadata.items())
    for name, dims, kind, offset in entries:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % align) + data


def parts(path: Path) -> tuple[dict[str, Any], list[Entry], bytes]:
    """Return the metadata, the entries and the data of a good file, for `gguf_bytes`."""
    from refengine.checkpoint.gguf.file import GgufFile

    file = GgufFile(path)
    entries = [
        Entry(at.name, at.shape[::-1], NUMBER[at.dtype], at.offset - file.start)
        for at in file.tensors.values()
    ]
    metadata = {
        key: [float(x) for x in value] if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        for key, value in file.metadata.items()
    }
    data = bytes(file.map[file.start :])
    file.close()
    return metadata, entries, data


def rewrite(path: Path, out: Path, change) -> Path:
    """Write `out` with the metadata, entries and data that `change(metadata, entries, data)` returns."""
    out.write_bytes(gguf_bytes(*change(*parts(path))))
    return out

"""A file of arrays with a header: safetensors, a checksum over every byte, and writing that never damages.

    8 bytes: n  |  n bytes: {"__metadata__": {"format", "version", "checksum", ...}, name: ...}  |  data

The checksum is the SHA-256 of the whole file in which its own 64 digits are zeros. A file is written under
another name in the same directory and renamed when all of it is on the disk: at every moment the name leads
to the old file or to the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np

from refengine.checkpoint.safetensors_file import SafetensorsFile
from refengine.spec.config import InputError
from refengine.untrusted import parse_json, shown, size_of

FORMAT, VERSION = "refengine state", 1
ALIGN = 64  # bytes; the data begins on such a border
CODES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U8": np.dtype(np.uint8),
}
CODE_OF = {dtype: code for code, dtype in CODES.items()}
ZEROS = "0" * 64
CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{64})"')


def write(path: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
    """Write arrays and notes as one file; a file of that name stays whole until the new one is complete.

    Raises InputError where the file cannot be written.
    """
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned
    start = _header({name: (a.dtype, a.shape) for name, a in ordered}, notes)
    data = [np.ascontiguousarray(a).reshape(-1).view(np.uint8).data for _, a in ordered]
    digest = hashlib.sha256(start)
    for part in data:
        digest.update(part)
    start = start.replace(_field(ZEROS), _field(digest.hexdigest()), 1)
    replace_file(path, [start, *data])


def _header(sizes: dict[str, tuple[np.dtype, tuple[int, ...]]], notes: Mapping[str, str]) -> bytes:
    """Return the bytes before the data, with zeros for the checksum."""
    first = {"format": FORMAT, "version": str(VERSION), "checksum": ZEROS}
    header: dict[str, dict] = {"__metadata__": first | dict(notes)}
    end = 0
    for name, (dtype, shape) in sizes.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": CODE_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGN)
    return len(raw).to_bytes(8, "little") + raw


def _field(digits: str) -> bytes:
    """Return the checksum's field of the header."""
    return f'"checksum":"{digits}"'.encode()


def replace_file(path: Path, parts: list) -> None:
    """Put a file of these bytes in the place of `path`, at once: temporary file, fsync, rename, fsync."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be saved: {why}") from None
    finally:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk, where the system has a way to do so."""
    if os.name == "nt":
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return the notes and the arrays of a file, which is checked whole; the arrays are views of its map.

    Raises InputError for a file that is no saved state, is of another layout version, or is damaged.
    """
    size_of(path)
    damaged = f"{path} is damaged: it was cut short, or changed after it was saved"
    try:
        file = SafetensorsFile(path)
    except InputError as error:
        if "cannot read" in str(error):
            raise
        raise InputError(f"{path} is not a saved state, or is damaged") from None
    notes = parse_json(file.header, f"the header of {path}").get("__metadata__", {})
    if notes.get("format") != FORMAT:
        raise InputError(f"{path} is not a saved state of refengine")
    if notes.get("version") != str(VERSION):
        theirs = shown(notes.get("version"))
        raise InputError(f"{path} has layout version {theirs}, and this refengine reads version {VERSION}")
    found = CHECKSUM.search(file.header)
    if found is None:
        raise InputError(damaged)
    start = len(file.header).to_bytes(8, "little") + file.header
    digest = hashlib.sha256(start.replace(found[0], _field(ZEROS), 1))
    with memoryview(file.map) as data, data[file.start :] as rest:
        digest.update(rest)
    if digest.hexdigest() != found[1].decode():
        raise InputError(damaged)
    arrays = {}
    for name, at in file.tensors.items():
        if at.dtype not in CODES:
            raise InputError(f"{path} has the tensor {shown(name)} in {at.dtype}, which no state has")
        count = at.nbytes // CODES[at.dtype].itemsize
        arrays[name] = np.frombuffer(file.map, CODES[at.dtype], count, at.offset).reshape(at.shape)
    return notes, arrays


def packed(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return arrays as bytes [n], to be sent to another rank."""
    start = _header({name: (a.dtype, a.shape) for name, a in arrays.items()}, {})
    data = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.values()]
    return np.concatenate([np.frombuffer(start, np.uint8), *data])


def unpacked(raw: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays that `packed` made bytes of."""
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:start].tobytes())
    del header["__metadata__"]
    return {
        name: raw[start + at["data_offsets"][0] : start + at["data_offsets"][1]]
        .view(CODES[at["dtype"]])
        .reshape(at["shape"])
        for name, at in header.items()
    }

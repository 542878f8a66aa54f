"""One safetensors file: a length, a JSON header, and the bytes of all tensors, mapped into memory and never copied.

    8 bytes: n, little-endian  |  n bytes: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...}  |  data

The `safetensors` library copies what it reads and does not say where a tensor lies, so the map is our own: opening costs
only the header, and a tensor that nobody touches is never read from disk. The header is checked here as strictly as the
library checks it (the tests hold the two against each other), in sentences that say what to do.
"""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refengine.untrusted import parse_json, shown, size_of, unreadable
from spec.arrays import DTYPES
from spec.config import InputError

MAX_HEADER = 100_000_000  # bytes, as the format says
MAX_AXES = 32
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "BOOL": 8, "I8": 8, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class Stored(NamedTuple):
    """Where one tensor lies: in which file, under which name, and between which bytes."""

    file: SafetensorsFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def array(self) -> np.ndarray:
        """The tensor in the file's dtype: a read-only view of the map, or a copy where the file does not align it."""
        dtype = DTYPES[self.dtype]
        a = np.frombuffer(self.file.map, dtype, prod(self.shape), self.offset).reshape(self.shape)
        if not a.flags.aligned:
            a = a.copy()
            a.flags.writeable = False
        return a

    @property
    def raw(self) -> bytes:
        return self.file.map[self.offset : self.offset + self.nbytes]

    def part(self, i: int) -> Stored:
        """Slice i of the first axis, as a tensor of its own."""
        step = self.nbytes // self.shape[0]
        return self._replace(shape=self.shape[1:], offset=self.offset + i * step, nbytes=step)

    def release(self) -> None:
        """Let the system take back the memory that reading this tensor filled; a later read fills it again."""
        page = self.offset - self.offset % mmap.PAGESIZE
        if hasattr(self.file.map, "madvise"):
            self.file.map.madvise(mmap.MADV_DONTNEED, page, self.offset + self.nbytes - page)


class SafetensorsFile:
    """An open file: `tensors` by name, the raw `header`, the `map`."""

    def __init__(self, path: Path):
        self.path = path
        self.size = size_of(path)
        try:
            with open(path, "rb") as file:
                self.header = _header(path, self.size, file)
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise error if isinstance(error, InputError) else unreadable(path, error) from None
        self.tensors = {t.name: t for t in _tensors(self)}

    def close(self) -> None:
        """Unmap; where an array still looks into the map, it goes with the last of them."""
        try:
            self.map.close()
        except BufferError:
            del self.map


def _header(path: Path, size: int, file) -> bytes:
    """The bytes of the header, whose length is believed only where it can be true."""
    start = file.read(8)
    if start == b"version ":
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' in its directory")
    if size < 8:
        raise InputError(f"{path} is {'empty' if not size else 'too short for a safetensors file'}; download it again")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise InputError(f"{path} is not a safetensors file: its header would be {length} bytes long")
    if 8 + length > size:
        raise truncated(path, 8 + length, size)
    return file.read(length)


def _tensors(file: SafetensorsFile) -> list[Stored]:
    """The tensors of a file in the order of their bytes; the header is right about every byte, or refused."""
    path, start = file.path, 8 + len(file.header)
    header = parse_json(file.header, f"the header of {path}")
    if not isinstance(header, dict):
        raise InputError(f"the header of {path} is not a JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise InputError(f"the header of {path} has a __metadata__ that is not text")
    found = [_tensor(file, start, name, entry) for name, entry in header.items()]
    found.sort(key=lambda t: (t.offset, t.nbytes))
    end = start
    for t in found:
        if t.offset != end:
            what = "overlaps another" if t.offset < end else f"leaves {t.offset - end} bytes before it unused"
            raise InputError(f"{path} is damaged: the tensor {shown(t.name)} {what}")
        end += t.nbytes
    if end > file.size:
        raise truncated(path, end, file.size)
    if end < file.size:
        raise InputError(f"{path} has {file.size - end} bytes after its last tensor: it is damaged; download it again")
    return found


def _tensor(file: SafetensorsFile, start: int, name: str, entry) -> Stored:
    def wrong(what: str) -> InputError:
        return InputError(f"{file.path} is damaged: the tensor {shown(name)} has {what}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("an entry that is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise wrong(f"the unknown dtype {shown(dtype)}")
    if not _sizes(shape):
        raise wrong(f"the impossible shape {shown(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"the impossible data_offsets {shown(offsets)}")
    nbytes, bits = offsets[1] - offsets[0], prod(shape) * BITS[dtype]
    if 8 * nbytes != bits:
        raise wrong(f"{nbytes} bytes for {dtype} {shown(shape)}, which takes {-(-bits // 8)}")
    return Stored(file, name, dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(value) -> bool:
    return isinstance(value, list) and len(value) <= MAX_AXES and all(type(n) is int and 0 <= n < 2**63 for n in value)


def truncated(path: Path, promised: int, size: int) -> InputError:
    what = f"its header promises {promised} bytes, the file has {size}"
    return InputError(f"{path} is truncated: {what}; download it again")

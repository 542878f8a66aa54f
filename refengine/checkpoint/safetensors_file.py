"""One safetensors file: a length, a JSON header, and the bytes of all tensors, mapped into memory.

    8 bytes: n  |  n bytes: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...}  |  data

The `safetensors` library copies the data that it reads and does not return offsets, so this module makes its
own map: opening reads the header alone, and data that is not used is never read from the disk. The header is
checked as strictly as by the library (a test compares the two), with sentences on what to do.
"""

from __future__ import annotations

import gc
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from refengine.spec.arrays import DTYPES
from refengine.spec.config import InputError
from refengine.untrusted import parse_json, shown, size_of, unreadable

MAX_HEADER = 100_000_000  # bytes, as the format has it
MAX_AXES = 32
LARGE = 2**63  # no size is as large
KEYS = {"dtype", "shape", "data_offsets"}
INTEGERS = {int}  # and no bool
BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "BOOL": 8,
    "I8": 8,
    "U8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


class Stored(NamedTuple):
    """Holds where one tensor lies: its file, its name there, its dtype and shape, its first byte."""

    file: MappedFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def array(self) -> np.ndarray:
        """Return the tensor in the file's dtype: a read-only view of the map; a copy if it is misaligned."""
        a = np.frombuffer(self.file.map, DTYPES[self.dtype], prod(self.shape), self.offset)
        if not a.flags.aligned:
            a = a.copy()
            a.flags.writeable = False
        return a.reshape(self.shape)

    @property
    def raw(self) -> bytes:
        """Return the bytes of the tensor as they are in the file."""
        return self.file.map[self.offset : self.offset + self.nbytes]

    def part(self, i: int) -> Stored:
        """Return slice i of the first axis, as a tensor of its own."""
        step = self.nbytes // self.shape[0]
        return self._replace(shape=self.shape[1:], offset=self.offset + i * step, nbytes=step)

    def release(self) -> None:
        """Give back the memory that reading filled; a later read fills it again."""
        page = self.offset - self.offset % mmap.PAGESIZE
        if hasattr(self.file.map, "madvise"):
            self.file.map.madvise(mmap.MADV_DONTNEED, page, self.offset + self.nbytes - page)


class MappedFile:
    """Holds an open file: its `path` and `size`, the `map`, the raw `header`, and the `start` of the data."""

    path: Path
    size: int
    map: mmap.mmap
    header: bytes
    start: int

    def in_large_pages(self) -> None:
        """Ask the system to keep data that is still to be read in large pages, which are cheaper to address.

        Not for a process that reads only a part of the file: pages are filled whole.
        """
        with suppress(AttributeError, OSError):  # where there is no such advice
            self.map.madvise(mmap.MADV_HUGEPAGE)

    def close(self) -> None:
        """Unmap the file, at once or when the last array that views it is gone."""
        try:
            self.map.close()
        except BufferError:
            del self.map


class SafetensorsFile(MappedFile):
    """Holds an open safetensors file and its `tensors` by name."""

    def __init__(self, path: Path):
        self.path = path
        self.size = size_of(path)
        try:
            with open(path, "rb") as file:
                self.header = _header(path, self.size, file)
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        self.start = 8 + len(self.header)
        with without_collection():
            self.tensors = {at.name: at for at in _tensors(self)}


@contextmanager
def without_collection() -> Iterator[None]:
    """Suspend the collector of cycles while many objects are made that form none: a third of the time.

    Also as a decorator.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _header(path: Path, size: int, file: BinaryIO) -> bytes:
    """Return the bytes of the header, after a check of its length."""
    start = file.read(8)
    if start == b"version ":
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' there")
    if size < 8:
        what = "too short for a safetensors file" if size else "empty"
        raise InputError(f"{path} is {what}: download it again")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise InputError(f"{path} is not a safetensors file: its header would be {length} bytes long")
    if 8 + length > size:
        raise _truncated(path, 8 + length, size)
    return file.read(length)


def _tensors(file: SafetensorsFile) -> list[Stored]:
    """Return the tensors in the order of their bytes; each byte of the data must belong to exactly one."""
    header = parse_json(file.header, f"the header of {file.path}")
    if not isinstance(header, dict):
        raise InputError(f"the header of {file.path} is not a JSON object")
    remarks = header.pop("__metadata__", {})
    if not isinstance(remarks, dict) or not all(_is_text(k) and _is_text(v) for k, v in remarks.items()):
        raise InputError(f"the header of {file.path} has a __metadata__ that is not text")
    found = _entries(file, header)
    found.sort(key=itemgetter(Stored._fields.index("offset"), Stored._fields.index("nbytes")))
    again = "download it again"
    end: int = file.start
    for at in found:
        if at.offset != end:
            what = "overlaps another" if at.offset < end else "leaves a hole before it"
            raise InputError(f"{file.path} is damaged: the tensor {shown(at.name)} {what}; {again}")
        end += at.nbytes
    if end > file.size:
        raise _truncated(file.path, end, file.size)
    if end < file.size:
        raise InputError(f"{file.path} is damaged: {file.size - end} bytes follow its last tensor; {again}")
    return found


def _entries(file: SafetensorsFile, header: dict) -> list[Stored]:
    """Return what the entries of the header say; a dtype with a shape is checked once."""
    start, found, take = file.start, [], itemgetter("dtype", "shape", "data_offsets")
    known: dict[tuple[str, str], tuple[tuple[int, ...], int]] = {}  # shape and bytes
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = take(entry)
            shape, nbytes = known[dtype, repr(shape)]
            whole = type(begin) is type(end) is int and 0 <= begin < LARGE and end - begin == nbytes
            fits = whole and len(entry) == len(KEYS) and name.isascii()
        except (KeyError, TypeError, ValueError):
            fits = False
        if fits:
            found.append(Stored(file, name, dtype, shape, start + begin, nbytes))
        else:
            found.append(at := _tensor(file, start, name, entry))
            known[at.dtype, repr(list(at.shape))] = at.shape, at.nbytes
    return found


def _tensor(file: SafetensorsFile, start: int, name: str, entry) -> Stored:
    """Return one entry of the header, checked by itself; start: the offset of the data."""
    if not _is_text(name):
        raise _wrong(file, name, "a name that is not text")
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise _wrong(file, name, "an entry that is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _wrong(file, name, f"the unknown dtype {shown(dtype)}")
    if not _integers(shape):
        raise _wrong(file, name, f"the impossible shape {shown(shape)}")
    shape = tuple(shape)
    if shape and not (min(shape) >= 0 and max(shape) < LARGE):
        raise _wrong(file, name, f"the impossible shape {shown(list(shape))}")
    if not _integers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] < LARGE:
        raise _wrong(file, name, f"the impossible data_offsets {shown(offsets)}")
    begin, end = offsets
    if 8 * (end - begin) != prod(shape) * BITS[dtype]:
        what = f"{end - begin} bytes, which is not what {dtype} {shown(list(shape))} takes"
        raise _wrong(file, name, what)
    return Stored(file, name, dtype, shape, start + begin, end - begin)


def _wrong(file: SafetensorsFile, name: str, what: str) -> InputError:
    return InputError(f"{file.path} is damaged: the tensor {shown(name)} has {what}")


def _is_text(value) -> bool:
    """Return whether a value is a string of whole characters; JSON can spell halves of them."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def _integers(value) -> bool:
    """Return whether a value is a list of whole numbers, no longer than the axes of an array."""
    return isinstance(value, list) and len(value) <= MAX_AXES and INTEGERS.issuperset(map(type, value))


def _truncated(path: Path, promised: int, size: int) -> InputError:
    what = f"its header promises {promised} bytes, the file has {size}"
    return InputError(f"{path} is truncated: {what}; download it again")

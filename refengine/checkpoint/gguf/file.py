"""One GGUF file: its metadata, and where its tensors lie in a memory map.

    "GGUF"  version  tensors n  keys k  |  k x (key, type, value)  |  n x (name, dims, type, offset)  |  data

Every count and length is checked against the remaining bytes before it is used, so that a damaged file takes
no more time or memory than a good one. The package `gguf` reads the same files, in ten
seconds for a vocabulary of 131,072 tokens: the tests compare with it.
"""

from __future__ import annotations

import mmap
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from refengine.checkpoint.gguf.stored import TYPES, AnyInFile, StoredBlocks, unreadable_type
from refengine.checkpoint.safetensors_file import MappedFile, Stored, without_collection
from refengine.spec.config import InputError
from refengine.untrusted import shown, size_of, unreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 128 * 2**20  # bytes; the largest vocabularies take 20 MB
MAX_KEYS, MAX_TENSORS, MAX_ITEMS = 2**16, 2**18, 2**21
MAX_AXES = 4
LARGE = 2**62  # no size is as large
NUMBERS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9
AGAIN = "download it again"


class GgufFile(MappedFile):
    """Holds an open file: its `metadata` by key, and its `tensors` by name.

    A string is a str, a list of strings a list of bytes, a list of numbers an array.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = size_of(path)
        try:
            with open(path, "rb") as file:
                check_magic(path, file.read(8), self.size)
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        with without_collection():
            reader = _Reader(path, self.map, min(self.size, MAX_HEADER))
            self.metadata, entries = _header(reader)
            align = _alignment(path, self.metadata)
            self.start = reader.at + -reader.at % align
            self.header = self.map[: self.start]
            self.tensors: dict[str, AnyInFile] = {name: self._tensor(name, *entry, align) for name, entry in
                                                  entries.items()}  # fmt: skip
        self._check_places()

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int, align: int) -> AnyInFile:
        """Return where a tensor lies, checked by itself."""
        if (kind := TYPES.get(number)) is None:
            raise unreadable_type(self.path, name, number)
        if not shape or min(shape) < 1 or prod(shape) >= LARGE:
            raise self._wrong(name, f"the impossible shape {shown(list(shape))}")
        if shape[-1] % kind.columns:
            raise self._wrong(name, f"rows of {shape[-1]} elements, which are not blocks of {kind.columns}")
        nbytes = prod(shape) // kind.columns * kind.nbytes
        if offset % align:
            raise self._wrong(name, f"the offset {offset}, which is not a multiple of {align}")
        offset += self.start
        if offset + nbytes > self.size:
            what = f"its header promises {offset + nbytes} bytes, the file has {self.size}"
            raise InputError(f"{self.path} is truncated: {what}; {AGAIN}")
        if kind.plain:
            return Stored(self, name, kind.name, shape, offset, nbytes)
        return StoredBlocks(self, name, kind.name, shape, offset, nbytes, None)

    def _check_places(self) -> None:
        """Raise InputError if two tensors share a byte."""
        end, last = 0, ""
        for at in sorted(self.tensors.values(), key=attrgetter("offset")):
            if at.offset < end:
                raise self._wrong(at.name, f"bytes that {shown(last)} has too")
            end, last = at.offset + at.nbytes, at.name

    def _wrong(self, name: str, what: str) -> InputError:
        return InputError(f"{self.path} is damaged: the tensor {shown(name)} has {what}; {AGAIN}")


def check_magic(path: Path, start: bytes, size: int) -> None:
    """Raise InputError unless a file begins as a GGUF file of a version that is read does."""
    if start == b"version ":
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull' there")
    if size < 24:
        what = "too short for a GGUF file" if size else "an empty file, no GGUF file"
        raise InputError(f"{path} is {what}: {AGAIN}")
    if start[:4] != MAGIC:
        raise InputError(f"{path} is not a GGUF file: it begins with {start[:4]!r}")
    version = int.from_bytes(start[4:], "little")
    if version not in VERSIONS:
        if int.from_bytes(start[4:], "big") in VERSIONS:
            raise InputError(f"{path} is a GGUF file for big-endian machines: not supported")
        known = " and ".join(map(str, VERSIONS))
        raise InputError(f"{path} is GGUF of version {version}; refengine reads {known}: convert it again")


class _Reader:
    """Reads numbers and strings from the header; `at` is the next byte, `end` the first beyond it."""

    def __init__(self, path: Path, raw: mmap.mmap, end: int):
        self.path, self.raw, self.at, self.end = path, raw, 0, end

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        after = self.at + count
        if after > self.end:
            if self.end == MAX_HEADER:
                raise self.wrong(f"its header is longer than {MAX_HEADER} bytes")
            raise InputError(f"{self.path} is truncated: it ends within its header; {AGAIN}")
        found = self.raw[self.at : after]
        self.at = after
        return found

    def number(self, kind: str) -> Any:
        """Return the next number."""
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """Return the next count, of things that take some bytes each; InputError for an impossible one."""
        count = self.number("<u8")
        if count > most or count * least_bytes > self.end - self.at:
            raise self.wrong(f"it would have {count} {what}")
        return count

    def string(self) -> bytes:
        """Return the next string."""
        return self.take(int.from_bytes(self.take(8), "little"))

    def strings(self, count: int) -> list[bytes]:
        """Return the next strings: a vocabulary has 131,072, so without a call for each."""
        raw, at, found = self.raw, self.at, []
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(raw[at:begin], "little")
            if at > self.end:
                self.take(at - self.at)  # which raises
            found.append(raw[begin:at])
        self.at = at
        return found

    def text(self, what: str) -> str:
        """Return the next string as text; InputError if it is not UTF-8."""
        raw = self.string()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.wrong(f"{what} {shown(raw)} is not UTF-8 text") from None

    def value(self, key: str) -> Any:
        """Return the value of a key."""
        kind = self.number("<u4")
        if kind == STRING:
            return self.text(f"the value of {shown(key)}")
        if kind != ARRAY:
            return self.number(self.dtype(key, kind))
        kind = self.number("<u4")
        if kind == STRING:
            return self.strings(self.count(f"strings in {shown(key)}", MAX_ITEMS, 8))
        if kind == ARRAY:
            raise InputError(f"{self.path} has lists within the list {shown(key)}: not supported")
        dtype = np.dtype(self.dtype(key, kind))
        count = self.count(f"numbers in {shown(key)}", MAX_ITEMS, dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def dtype(self, key: str, kind: int) -> str:
        """Return the dtype of numbers of a kind."""
        if kind not in NUMBERS:
            raise self.wrong(f"the value of {shown(key)} is of the unknown type {kind}")
        return NUMBERS[kind]

    def wrong(self, what: str) -> InputError:
        """Return the error for something that cannot be."""
        return InputError(f"{self.path} is damaged: {what}; {AGAIN}")


def _header(reader: _Reader) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]]]:
    """Return the metadata, and of each tensor its shape, the number of its type, and its offset."""
    reader.take(8)
    tensors = reader.count("tensors", MAX_TENSORS, 24)
    keys = reader.count("keys", MAX_KEYS, 13)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text("the key")
        if key in metadata:
            raise reader.wrong(f"it has the key {shown(key)} twice")
        metadata[key] = reader.value(key)
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = reader.text("the name")
        if name in entries:
            raise reader.wrong(f"it has the tensor {shown(name)} twice")
        axes = reader.number("<u4")
        if axes > MAX_AXES:
            raise reader.wrong(f"the tensor {shown(name)} would have {axes} axes")
        shape = tuple(reader.number("<u8") for _ in range(axes))[::-1]
        entries[name] = (shape, reader.number("<u4"), reader.number("<u8"))
    return metadata, entries


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    """Return the alignment of the data in bytes."""
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise InputError(f"{path} is damaged: general.alignment = {shown(align)} is not valid; {AGAIN}")
    return align

"""Locate tensors of a GGUF file, and read each as the tensor table has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refengine.checkpoint.safetensors_file import MappedFile, Stored
from refengine.spec.arrays import DTYPES, Array, Weight
from refengine.spec.blocks import FORMATS, Blocks, Format
from refengine.spec.config import InputError
from refengine.untrusted import shown


class Type(NamedTuple):
    """Holds a type of elements: its name, and the columns and bytes of a block."""

    name: str
    columns: int
    nbytes: int

    @property
    def plain(self) -> bool:
        """Return whether it is a floating-point dtype."""
        return self.name in DTYPES


# The numbers of the types in files. LIBRARY: their meaning is taken from the package gguf, which has their
# long tables of values.
NUMBERS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
LIBRARY = {
    16: Type("IQ2_XXS", 256, 66), 17: Type("IQ2_XS", 256, 74), 18: Type("IQ3_XXS", 256, 98),
    19: Type("IQ1_S", 256, 50), 21: Type("IQ3_S", 256, 110), 22: Type("IQ2_S", 256, 82),
    29: Type("IQ1_M", 256, 56), 34: Type("TQ1_0", 256, 54), 35: Type("TQ2_0", 256, 66),
}  # fmt: skip
PLAIN = {0: Type("F32", 1, 4), 1: Type("F16", 1, 2), 28: Type("F64", 1, 8), 30: Type("BF16", 1, 2)}
OURS = {n: Type(name, FORMATS[name.lower()].columns, FORMATS[name.lower()].nbytes) for n, name in
        NUMBERS.items()}  # fmt: skip
TYPES = PLAIN | OURS | LIBRARY
OTHERS = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 41: "Q1_0"}  # not of weights


def unreadable_type(path: Path, name: str, number: int) -> InputError:
    """Return the error for a tensor of a type that is not read."""
    kind = OTHERS.get(number, f"number {number}")
    known = ", ".join(kind.name for kind in TYPES.values())
    return InputError(f"{path}: the tensor {shown(name)} has the type {kind}, which is none of {known}")


@cache
def format_of(name: str) -> Format:
    """Return the meaning of the blocks of a type; InputError where it needs a package that is not there."""
    if name.lower() in FORMATS:
        return FORMATS[name.lower()]
    if find_spec("gguf") is None:
        raise InputError(f"weights of the type {name} need the package gguf: pip install 'refengine[gguf]'")
    kind = next(kind for kind in LIBRARY.values() if kind.name == name)

    def parts(blocks: Array) -> tuple[Array, Array, None]:
        import gguf

        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
        return values[:, None], np.ones((len(blocks), 1), np.float32), None

    return Format(name.lower(), kind.columns, kind.nbytes, parts)


class StoredBlocks(NamedTuple):
    """Holds where the blocks of one tensor lie, and the tensor of their scale, if there is one."""

    file: MappedFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    scale: Stored | None

    def array(self) -> Blocks:
        """Return the weight, a view of the map."""
        data = np.frombuffer(self.file.map, np.uint8, self.nbytes, self.offset)
        data = data.reshape(*self.shape[:-1], -1)
        return Blocks(format_of(self.dtype), data, None if self.scale is None else scale_of(self.scale))

    @property
    def raw(self) -> bytes:
        """Return the bytes of the blocks as they are in the file."""
        return self._plain.raw

    def part(self, i: int) -> StoredBlocks:
        """Return slice i of the first axis, as a tensor of its own."""
        scale = self.scale.part(i) if self.scale is not None and self.scale.nbytes > 4 else self.scale
        size, *rest = self.shape
        step = self.nbytes // size
        return StoredBlocks(
            self.file, self.name, self.dtype, tuple(rest), self.offset + i * step, step, scale
        )

    def release(self) -> None:
        """Give back the memory that reading filled; a later read fills it again."""
        self._plain.release()

    @property
    def _plain(self) -> Stored:
        return Stored(self.file, self.name, self.dtype, self.shape, self.offset, self.nbytes)


def scale_of(at: Stored) -> np.float32:
    """Return the factor of a matrix; InputError if it is not a finite number."""
    value = np.float32(at.array().reshape(-1)[0])
    if not np.isfinite(value):
        raise InputError(
            f"{at.file.path} is damaged: the scale {shown(at.name)} is {value}; download it again"
        )
    return value


class Altered(NamedTuple):
    """Holds a tensor that a converter has altered, and the function that gives it back."""

    source: Stored | StoredBlocks | Altered
    dtype: str
    shape: tuple[int, ...]
    back: Callable[[Any], Weight]

    def array(self) -> Weight:
        """Return the tensor as the table has it."""
        return self.back(self.source.array())

    @property
    def file(self) -> MappedFile:
        """Return the file that holds the source."""
        return self.source.file

    @property
    def name(self) -> str:
        """Return the name of the source."""
        return self.source.name

    @property
    def nbytes(self) -> int:
        """Return the bytes of the source."""
        return self.source.nbytes

    @property
    def raw(self) -> bytes:
        """Return the bytes of the source as they are in the file."""
        return self.source.raw

    def part(self, i: int) -> Altered:
        """Return slice i of the first axis; no tensor that is cut so is altered."""
        raise NotImplementedError

    def release(self) -> None:
        """Give back the memory that reading filled; a later read fills it again."""
        self.source.release()


AnyInFile = Stored | StoredBlocks

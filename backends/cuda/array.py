"""An array on a device: where its elements lie, and views of them, made without reading the memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
}


@dataclass(frozen=True, eq=False, repr=False)
class DeviceArray:
    """`shape` elements, `strides` apart (in elements), from `offset` on (in elements), in some memory."""

    device: Any
    memory: Any  # whatever the device allocated; has .ptr, and lives as long as an array looks at it
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    readonly: bool = False  # a verb that changes its state in place changes a copy instead

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        """Return the bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Return the bytes of all elements."""
        return self.size * self.itemsize

    @property
    def pointer(self) -> int:
        """Return the address of the first element."""
        return self.memory.ptr + self.offset * self.itemsize

    @property
    def contiguous(self) -> bool:
        """Return whether the elements lie side by side in order."""
        there = zip(self.shape, self.strides, packed_strides(self.shape), strict=True)
        return not self.size or all(length == 1 or stride == packed for length, stride, packed in there)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray({list(self.shape)}, {self.dtype}, {self.device.name})"

    def __array__(self, *args, **kwargs):
        raise TypeError("an array on a device is not an array on the host: use to_host()")

    def __getitem__(self, key) -> DeviceArray:
        """Return a view by integers and slices; a copy by arrays of row numbers, of one or two axes."""
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, (list, np.ndarray, DeviceArray)) for k in keys):
            rows = (self.device.to_host(k) if isinstance(k, DeviceArray) else k for k in keys)
            return self.device.gather(self, [np.asarray(k, np.int64) for k in rows])
        if not all(k is None or k is Ellipsis or isinstance(k, (slice, int, np.integer)) for k in keys):
            raise TypeError(f"an array on a device cannot be indexed by {key!r}")
        whole = _outline(self.shape, self.strides)
        part = whole[keys if any(k is Ellipsis for k in keys) else (*keys, ...)]  # a view even of one element
        start = part.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        part_strides = part.strides if part.size else packed_strides(part.shape)
        return replace(self, offset=self.offset + start, shape=part.shape, strides=part_strides)

    def reshape(self, *shape) -> DeviceArray:
        """Return the same elements in another shape: a view where there is one, else a copy."""
        shape = _given(shape, self.size)
        strides = reshaped(self.shape, self.strides, shape)
        if strides is None:
            return self.copy().reshape(shape)
        return replace(self, shape=shape, strides=strides)

    def copy(self) -> DeviceArray:
        """Return the same elements side by side in memory of their own."""
        return self.device.copied(self)

    def packed(self) -> DeviceArray:
        """Return this array if its elements lie side by side in order, else such a copy."""
        return self if self.contiguous else self.copy()

    def in_rows(self) -> DeviceArray:
        """Return this array if the elements of its last axis lie side by side, else a packed copy."""
        return self if self.strides[-1] == 1 or self.shape[-1] == 1 else self.copy()

    def __add__(self, other: DeviceArray) -> DeviceArray:
        if not isinstance(other, DeviceArray):
            return NotImplemented
        return self.device.add(self, other)

    __array_ufunc__ = None  # NumPy shall not try to add


def packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a shape whose elements lie side by side, the last axis fastest."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def reshaped(shape, strides, new) -> tuple[int, ...] | None:
    """Return the strides with which the same memory has the shape `new`; None where there are none."""
    if not prod(new):
        return packed_strides(new)
    runs: list[list[int]] = []  # (elements, stride of the last): merged axes, the last axis first
    for length, stride in reversed([*zip(shape, strides, strict=True)]):
        if length == 1:
            continue
        if runs and stride == runs[-1][0] * runs[-1][1]:
            runs[-1][0] *= length
        else:
            runs.append([length, stride])
    result, within = [], 1  # `within`: elements of the axes that follow, as far apart as they are
    for length in reversed(new):
        if length == 1:
            result.append(within)  # no stride is wrong, but some are not whole vectors
            continue
        if not runs or runs[0][0] % length:
            return None
        result.append(runs[0][1])
        within = runs[0][1] * length
        runs[0] = [runs[0][0] // length, within]
        if runs[0][0] == 1:
            runs.pop(0)
    return tuple(reversed(result))


def _outline(shape, strides) -> np.ndarray:
    """Return an array of bytes with these strides, not to be read: NumPy's own arithmetic of views."""
    return as_strided(np.empty(1, np.uint8), shape, strides)


def _given(shape, size: int) -> tuple[int, ...]:
    """Return the arguments of reshape as a shape; one -1 stands for the rest."""
    shape = tuple(int(s) for s in (shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape))
    if -1 in shape:
        known = -prod(shape)
        if shape.count(-1) > 1 or not known or size % known:
            raise ValueError(f"{size} elements do not fit the shape {list(shape)}")
        shape = tuple(size // known if s == -1 else s for s in shape)
    if prod(shape) != size:
        raise ValueError(f"{size} elements do not fit the shape {list(shape)}")
    return shape

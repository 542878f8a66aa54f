"""Weights: from the host's memory map to arrays on the device.

A matrix, q | k | v as one matrix, or all experts of a layer as two stacks; small tensors in float32.
"""

from __future__ import annotations

import numpy as np

from refengine.backends.cuda.array import DTYPES, DeviceArray
from refengine.backends.cuda.experts import Stacked
from refengine.spec.arrays import widen


def place(group, values: list[np.ndarray], *, device, dtype: str):
    """Return the placed form of a group of tensors, in `dtype` where they are matrices."""
    dtype = "float32" if group.rows[0].precision == "small" else dtype
    if group.name == "experts":
        return Stacked(stacked(values[::2], device, dtype), stacked(values[1::2], device, dtype))
    if len(values) == 1:
        return device.from_host(converted(values[0], dtype))
    return joined(values, device, dtype)


def stacked(values: list[np.ndarray], device, dtype: str) -> DeviceArray:
    """Return E matrices of one shape as one array; each goes to the device by itself."""
    whole = device.empty((len(values), *values[0].shape), dtype)
    for i, value in enumerate(values):
        device.upload(whole[i], converted(value, dtype))
    return whole


def joined(values: list[np.ndarray], device, dtype: str) -> DeviceArray:
    """Return matrices one below the other, as one."""
    whole = device.empty((sum(len(value) for value in values), *values[0].shape[1:]), dtype)
    first = 0
    for value in values:
        device.upload(whole[first : first + len(value)], converted(value, dtype))
        first += len(value)
    return whole


def converted(value: np.ndarray, dtype: str) -> np.ndarray:
    """Return the same numbers in `dtype`; rounded where that is narrower than the file's."""
    if dtype == "float32":
        return widen(value, np.dtype(np.float32))
    return value.astype(DTYPES[dtype], copy=False)

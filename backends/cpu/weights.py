"""Weights: from the memory map to the loops without a copy, wherever the file has a dtype that they read."""

from __future__ import annotations

import numpy as np

from refengine.backends.cpu.arrays import KINDS
from refengine.backends.cpu.experts import Listed
from refengine.spec.arrays import DTYPES

NARROW = {"bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}


def place(group, values: list[np.ndarray], *, dtype: str):
    """Return a matrix, a tuple (q, k, v), or the experts as a Listed.

    Matrices stay in the dtype of the file: a product is in float32 whatever that is, so a wider copy of a
    weight would have the same numbers. Only `dtype` bfloat16 and float16 round a matrix that the file has
    wider. Small tensors are float32; a convolution's weight c 1 k is kept as k c.
    """
    if group.rows[0].precision == "small":
        small = [np.ascontiguousarray(value, np.float32) for value in values]
        return np.ascontiguousarray(small[0][:, 0].T) if group.name == "conv1d.weight" else small[0]
    placed = [matrix(value, dtype) for value in values]
    if group.name == "experts":
        return Listed.of(placed[::2], placed[1::2])
    return placed[0] if len(placed) == 1 else tuple(placed)


def matrix(value: np.ndarray, dtype: str) -> np.ndarray:
    """Return a matrix that the loops read: in the file's dtype, or narrower where `dtype` is."""
    if dtype in NARROW and value.dtype != NARROW[dtype]:
        value = value.astype(NARROW[dtype])
    elif value.dtype.name not in KINDS:
        value = value.astype(np.float32)
    return np.ascontiguousarray(value)

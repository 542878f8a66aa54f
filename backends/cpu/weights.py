"""Pass weights from the memory map to the loops, without a copy if the loops can read the file's form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refengine.backends.cpu.arrays import BLOCK, BLOCKS, KINDS
from refengine.backends.cpu.experts import Listed
from refengine.spec.arrays import DTYPES, Weight, widen
from refengine.spec.quant import Packed

NARROW = {"bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}


def place(group, values: list[Weight], *, dtype: str):
    """Return a matrix, a tuple (q, k, v), or the experts as a Listed.

    Matrices stay in the form of the file, packed or not: every product is in float32, so a wider copy of a
    weight would have the same numbers. Only a `dtype` of bfloat16 or float16 rounds a matrix that is wider in
    the file. Small tensors are float32; a convolution's weight c 1 k is kept as k c.
    """
    if group.rows[0].precision == "small":
        small = [np.ascontiguousarray(widen(value, np.dtype(np.float32))) for value in values]
        return np.ascontiguousarray(small[0][:, 0].T) if group.name == "conv1d.weight" else small[0]
    placed = [matrix(value, dtype) for value in values]
    if group.name == "experts":
        listed = Listed.of(placed[::2], placed[1::2])
        if not listed.readable:  # of several kinds
            placed = [matrix(widen(value, np.dtype(np.float32)), dtype) for value in placed]
            listed = Listed.of(placed[::2], placed[1::2])
        return listed
    return placed[0] if len(placed) == 1 else tuple(placed)


def matrix(value: Weight, dtype: str) -> Weight:
    """Return a matrix that the loops can read: in the file's form, or narrower if `dtype` is."""
    if isinstance(value, Packed):
        if value.kind == "FP8":
            return replace(value, codes=np.ascontiguousarray(value.codes))
        if value.block % BLOCK == 0:
            value = value if value.block == BLOCK else value.in_blocks(BLOCK)
            codes, scale = np.ascontiguousarray(value.codes), np.ascontiguousarray(value.scale)
            return replace(value, codes=codes, scale=scale)
    elif not isinstance(value, np.ndarray):
        from refengine.spec.blocks import Blocks  # only GGUF files have them

        if isinstance(value, Blocks) and value.kind in BLOCKS:
            return replace(value, data=np.ascontiguousarray(value.data))
    if not isinstance(value, np.ndarray):  # a kind without a loop, or a cut inside a block
        value = value.dequantize(NARROW.get(dtype, np.dtype(np.float32)))
    if dtype in NARROW and value.dtype != NARROW[dtype]:
        value = value.astype(NARROW[dtype])
    elif value.dtype.name not in KINDS:
        value = value.astype(np.float32)
    return np.ascontiguousarray(value)

"""Addresses and kinds of arrays of NumPy and PyTorch, and of packed weights, for the compiled loops.

The loops need no more than these, so the program of a model and its steps serve both libraries.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from refengine.backends.cpu.interface import filled
from refengine.spec.arrays import PackedWeight
from refengine.spec.quant import Packed

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}  # with the numbers of structures.h
PACKED = {"FP8": 3, "MXFP8": 4, "NVFP4": 5}
BLOCK = 16  # columns that share a scale in the first three
BLOCKS = {
    "nvfp4": 6, "mxfp4": 7, "q8_0": 8, "q4_0": 9, "q4_1": 10, "q5_0": 11, "q5_1": 12, "q4_k": 13, "q5_k": 14,
    "q6_k": 15, "iq4_nl": 16,
}  # fmt: skip


def address(a) -> int | None:
    """Return the address of the first number of an array or a tensor; None for None."""
    if a is None:
        return None
    return a.__array_interface__["data"][0] if isinstance(a, np.ndarray) else a.data_ptr()


def kind_of(a) -> int | None:
    """Return the index of an array's dtype in KINDS, or None if it is not there."""
    return kind_of_dtype(a.dtype)


@cache
def kind_of_dtype(dtype) -> int | None:
    """Return the index of a dtype of NumPy or PyTorch in KINDS, or None."""
    return KINDS.get(str(dtype).removeprefix("torch."))


def in_order(a) -> bool:
    """Return whether an array or a tensor is contiguous in row-major order."""
    return a.flags.c_contiguous if isinstance(a, np.ndarray) else a.is_contiguous()


def matrix(a):
    """Return the structure Matrix of a weight; raise TypeError if the loops cannot read it."""
    if not isinstance(a, np.ndarray) and isinstance(a, PackedWeight):  # the second test is slow
        return packed_matrix(a)
    kind = kind_of(a)
    if kind is None or not in_order(a):
        raise TypeError(f"the compiled loops read no weight of {a.dtype}")
    return filled("Matrix", address(a), kind, None, 1.0)


def packed_matrix(a):
    """Return the structure Matrix of a packed weight; raise TypeError if the loops cannot read it."""
    if isinstance(a, Packed) and a.codes.flags.c_contiguous and a.scale.flags.c_contiguous:
        if a.kind == "FP8":  # the loops read 2^-8 of a code's value
            return filled("Matrix", address(a.codes), PACKED[a.kind], None, 256 * float(a.scale))
        if a.block == BLOCK or not a.size:
            factor = 1.0 if a.scale_2 is None else float(a.scale_2)
            return filled("Matrix", address(a.codes), PACKED[a.kind], address(a.scale), factor)
    elif not isinstance(a, Packed) and a.kind in BLOCKS and a.data.flags.c_contiguous:
        factor = 1.0 if a.scale is None else float(a.scale)
        return filled("Matrix", address(a.data), BLOCKS[a.kind], None, factor)
    raise TypeError(f"the compiled loops read no weight in {a.kind} like this")

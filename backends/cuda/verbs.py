"""Shared by the verbs: the activations that they are made for, launches, and arrays as rows."""

from __future__ import annotations

import math

import numpy as np

from refengine.backends.cuda.array import DTYPES


class Verbs:
    """Some verbs on a device, for the activations of `defines`: float32, bfloat16 with REAL_BF16."""

    def __init__(self, device, defines: tuple[str, ...] = ()):
        self.device, self.defines = device, defines
        self.dtype = "bfloat16" if "REAL_BF16" in defines else "float32"
        self.size = DTYPES[self.dtype].itemsize  # bytes of an activation
        self.pack = 16 // self.size  # activations in 16 bytes

    def launch(self, file: str, kernel: str, grid, block: int, *args, shared_bytes: int = 0):
        """Launch a kernel in the build of these activations."""
        self.device.launch(file, kernel, grid, (block,), args, shared_bytes, self.defines)


def rows(x):
    """Return x [.., c] as [rows, c], and how many elements apart these stand; a copy where that varies."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).in_rows()
    return x, np.int64(x.strides[0])


def tiles(count: int, size: int) -> int:
    """Return how many tiles of a size cover that many."""
    return -(-count // size)

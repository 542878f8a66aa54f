"""Packed weights beside tensors: they keep the form of the files, and pieces are dequantized when used.

    weight[first:last].dequantize(torch.bfloat16)

If the loops of the CPU backend multiply by weights, they read packed ones directly (weights.py). Otherwise,
on a CPU, a weight of any kind stays in host memory, perhaps in a memory map (`OnHost`). On another device its
codes and scales are tensors (`OnDevice`), and its values equal those of `Packed.dequantize` in
refengine/spec/quant.py bit by bit: computed in float32, in the same order, then rounded to the requested
dtype. No value is read on the host. `OnDevice` is tested on a CPU; it has not been run on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from refengine.spec.arrays import PackedWeight
from refengine.spec.quant import PAIRS

TINY = 0x00400000  # bits of 2^-127, a subnormal number


@dataclass(frozen=True, eq=False)
class OnHost:
    """A packed weight [o i] in host memory; rows of it are packed weights too."""

    weight: PackedWeight

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the matrix."""
        return self.weight.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> OnHost:
        """Return rows: a slice, or a tensor of indices of any shape."""
        return OnHost(self.weight[rows.numpy() if isinstance(rows, torch.Tensor) else rows])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix in `dtype`."""
        return torch.from_numpy(self.weight.dequantize(np.float32)).to(dtype)


@dataclass(frozen=True, eq=False)
class OnDevice:
    """A packed weight [o i] of modelopt's kinds on a device; rows of it are packed weights too.

    kind     "NVFP4", "FP8" or "MXFP8"
    codes    uint8 [o i/2] (NVFP4), else [o i]
    scale    uint8 [o i/block]; None for FP8
    scale_2  scale of the whole matrix; 1 for MXFP8
    """

    kind: str
    codes: torch.Tensor
    scale: torch.Tensor | None
    scale_2: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the matrix."""
        *rows, last = self.codes.shape
        return (*rows, last * (2 if self.kind == "NVFP4" else 1))

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows) -> OnDevice:
        """Return rows: a slice, or a tensor of indices of any shape."""
        scale = None if self.scale is None else self.scale[rows]
        return replace(self, codes=self.codes[rows], scale=scale)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix in `dtype`."""
        if not self.scale_2:
            return torch.zeros(self.shape, dtype=dtype, device=self.codes.device)
        if self.scale is None:
            return (e4m3(self.codes) * self.scale_2).to(dtype)
        if self.kind == "NVFP4":
            pairs = pairs_on(self.codes.device)[self.codes.int()]
            values, scale = pairs.view(torch.float32), e4m3(self.scale) * self.scale_2
        else:
            values, scale = e4m3(self.codes), power(self.scale)
        blocks = values.view(*self.scale.shape, -1).mul_(scale[..., None])
        return blocks.view(self.shape).to(dtype)


PACKED = (OnHost, OnDevice)


@cache
def pairs_on(device: torch.device) -> torch.Tensor:
    """Return [256] on a device: the two values of each byte of NVFP4, as one number of 8 bytes."""
    return torch.from_numpy(PAIRS.view(np.int64)).to(device)


def e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of E4M3 codes in float32."""
    return codes.view(torch.float8_e4m3fn).float()


def power(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^(exponent - 127) in float32, whose own exponents have the same bias."""
    return torch.where(exponents == 0, TINY, exponents.int() << 23).view(torch.float32)

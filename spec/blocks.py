"""Chapter 24. Blocks: the packed weights of GGUF files, as llama.cpp writes them.

    w = step code + offset      for each run of columns that shares a step; in float32

A row of a matrix is a sequence of blocks of 32, 64 or 256 columns, each with its own scales beside its codes:

    kind    columns, bytes   a run's step and offset                  codes
    q8_0        32, 34       d                                        8 bits, signed
    q4_0 q5_0   32, 18 22    d                                        4 and 5 bits, less 8 and 16
    q4_1 q5_1   32, 20 24    d, and m                                 4 and 5 bits
    q2_k       256, 84       d s and -dmin m, with 16 s and m of 4 bits   2 bits
    q3_k       256, 110      d (s - 32), 16 s of 6 bits               3 bits, less 4
    q4_k q5_k  256, 144 176  d s and -dmin m, 8 s and m of 6 bits     4 and 5 bits
    q6_k       256, 210      d s, 16 s of 8 bits, signed              6 bits, less 32
    iq4_nl      32, 18       d                                        4 bits, through a table
    iq4_xs     256, 136      d (s - 32), 8 s of 6 bits                4 bits, through the same table
    mxfp4       32, 17       2^(e - 127)                              e2m1
    nvfp4       64, 36       e4m3(s) scale, 4 s                       e2m1

d, dmin and m are float16. Codes lie in planes: a run of bytes holds the low bits of as many columns, then the
next bits of the columns that follow. A matrix in nvfp4 may have a float32 `scale` beside it, which is
`scale_2` of chapter 23: its codes and scales are those of NVFP4, in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from refengine.spec.arrays import Array
from refengine.spec.quant import BIAS, E2M1, E4M3

IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)  # the values of iq4_nl and iq4_xs


@dataclass(frozen=True)
class Format:
    """A kind of block: its name, its columns and bytes, and what its bytes mean.

    parts  blocks uint8 [n bytes] -> codes float32 [n runs columns-of-a-run], steps [n runs], offsets or None
    """

    kind: str
    columns: int
    nbytes: int
    parts: Callable[[Array], tuple[Array, Array, Array | None]]


@dataclass(frozen=True, eq=False)
class Blocks:
    """A packed weight [.. o i] of a GGUF file; slices of rows and of whole blocks of columns are packed too.

    format  what a block means
    data    uint8 [.. o bytes-of-a-row], as in the file
    scale   float32 [], a factor of the whole matrix; None without one
    """

    format: Format
    data: Array
    scale: np.float32 | None = None

    @property
    def kind(self) -> str:
        """Return the name of the format."""
        return self.format.kind

    @property
    def block(self) -> int:
        """Return the columns of a block."""
        return self.format.columns

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the matrix."""
        *rows, last = self.data.shape
        return (*rows, last // self.format.nbytes * self.block)

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the blocks."""
        return self.data.nbytes

    def __len__(self) -> int:
        return self.data.shape[0]

    def __getitem__(self, at) -> Blocks | Array:
        """Return rows `at` (of any form), or with a slice for the last axis also a run of columns.

        A run that begins or ends within a block is an array, float32.
        """
        if not (isinstance(at, tuple) and len(at) == self.ndim):
            return replace(self, data=self.data[at])
        *rows, columns = at
        start, stop, step = columns.indices(self.shape[-1])
        first, last = start // self.block, -(-stop // self.block)
        each = self.format.nbytes
        part = replace(self, data=self.data[(*rows, slice(first * each, last * each))])
        if step == 1 and start % self.block == stop % self.block == 0:
            return part
        return part.dequantize()[..., slice(start - first * self.block, stop - first * self.block, step)]

    def joined(self, others: list[Blocks], axis: int) -> Blocks:
        """Return this and other slices of one matrix, end to end along an axis."""
        return replace(self, data=np.concatenate([self.data, *(other.data for other in others)], axis))

    def dequantize(self, dtype=np.float32) -> Array:
        """Return the matrix: computed in float32, then in `dtype`."""
        if not self.size:
            return np.zeros(self.shape, dtype)
        blocks = np.ascontiguousarray(self.data).reshape(-1, self.format.nbytes)
        with np.errstate(over="ignore", invalid="ignore"):  # of a damaged file
            codes, step, offset = self.format.parts(blocks)
            if self.scale is not None:
                step = step * self.scale
                offset = None if offset is None else offset * self.scale
            codes = codes * step[..., None]
            if offset is not None:
                codes += offset[..., None]
        return codes.reshape(self.shape).astype(dtype, copy=False)


def planes(b: Array, run: int, bits: int) -> Array:
    """Return the numbers of `bits` bits in [n bytes], uint8: plane by plane in each run of bytes."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((b.reshape(len(b), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)).reshape(len(b), -1)


def half(b: Array) -> Array:
    """Return the float16 numbers in [n bytes] as float32."""
    return np.ascontiguousarray(b).view(np.float16).astype(np.float32)


def signed(b: Array) -> Array:
    """Return bytes as signed numbers, float32."""
    return np.ascontiguousarray(b).view(np.int8).astype(np.float32)


def runs(codes: Array, count: int) -> Array:
    """Return codes [n columns] as float32 [n count columns/count]."""
    return codes.astype(np.float32).reshape(len(codes), count, -1)


def _q8_0(b):
    return runs(signed(b[:, 2:]), 1), half(b[:, :2]), None


def _q4_0(b):
    return runs(planes(b[:, 2:], 16, 4), 1) - 8, half(b[:, :2]), None


def _q4_1(b):
    return runs(planes(b[:, 4:], 16, 4), 1), half(b[:, :2]), half(b[:, 2:4])


def _five(low: Array, high: Array) -> Array:
    """Return codes of 5 bits: 16 bytes with the low four, 4 bytes with the highest, in order."""
    return runs(planes(low, 16, 4) | planes(high, 1, 1) << 4, 1)


def _q5_0(b):
    return _five(b[:, 6:], b[:, 2:6]) - 16, half(b[:, :2]), None


def _q5_1(b):
    return _five(b[:, 8:], b[:, 4:8]), half(b[:, :2]), half(b[:, 2:4])


def _q2_k(b):
    scales, d, dmin = b[:, :16], half(b[:, 80:82]), half(b[:, 82:84])
    return runs(planes(b[:, 16:80], 32, 2), 16), d * (scales & 15), -dmin * (scales >> 4)


def _q3_k(b):
    codes = planes(b[:, 32:96], 32, 2) | planes(b[:, :32], 32, 1) << 2
    scales = planes(b[:, 96:104], 8, 4) | planes(b[:, 104:108], 4, 2) << 4
    return runs(codes, 16) - 4, half(b[:, 108:]) * (scales.astype(np.float32) - 32), None


def _six(b: Array) -> tuple[Array, Array]:
    """Return 8 scales and 8 minima of 6 bits from 12 bytes."""
    a, m, high = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = np.concatenate([a & 63, high & 15 | a >> 6 << 4], axis=1)
    return scales, np.concatenate([m & 63, high >> 4 | m >> 6 << 4], axis=1)


def _q4_k(b):
    scales, minima = _six(b[:, 4:16])
    return runs(planes(b[:, 16:], 32, 4), 8), half(b[:, :2]) * scales, -half(b[:, 2:4]) * minima


def _q5_k(b):
    scales, minima = _six(b[:, 4:16])
    codes = planes(b[:, 48:], 32, 4) | planes(b[:, 16:48], 32, 1) << 4
    return runs(codes, 8), half(b[:, :2]) * scales, -half(b[:, 2:4]) * minima


def _q6_k(b):
    codes = planes(b[:, :128], 64, 4) | planes(b[:, 128:192], 32, 2) << 4
    return runs(codes, 16) - 32, half(b[:, 208:]) * signed(b[:, 192:208]), None


def _iq4_nl(b):
    return runs(IQ4[planes(b[:, 2:], 16, 4)], 1), half(b[:, :2]), None


def _iq4_xs(b):
    scales = planes(b[:, 4:8], 1, 4) | planes(b[:, 2:4], 1, 2) << 4
    return runs(IQ4[planes(b[:, 8:], 16, 4)], 8), half(b[:, :2]) * (scales.astype(np.float32) - 32), None


def _mxfp4(b):
    step = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - BIAS - 1)  # half the step, of twice the values
    return runs(2 * E2M1[planes(b[:, 1:], 16, 4)], 1), step, None


def _nvfp4(b):
    scales = b[:, :4] & 0x7F
    return runs(E2M1[planes(b[:, 4:], 8, 4)], 4), np.where(scales == 0x7F, np.float32(0), E4M3[scales]), None


FORMATS = {
    each.kind: each
    for each in (
        Format("q8_0", 32, 34, _q8_0), Format("q4_0", 32, 18, _q4_0), Format("q4_1", 32, 20, _q4_1),
        Format("q5_0", 32, 22, _q5_0), Format("q5_1", 32, 24, _q5_1), Format("q2_k", 256, 84, _q2_k),
        Format("q3_k", 256, 110, _q3_k), Format("q4_k", 256, 144, _q4_k), Format("q5_k", 256, 176, _q5_k),
        Format("q6_k", 256, 210, _q6_k), Format("iq4_nl", 32, 18, _iq4_nl),
        Format("iq4_xs", 256, 136, _iq4_xs), Format("mxfp4", 32, 17, _mxfp4), Format("nvfp4", 64, 36, _nvfp4),
    )
}  # fmt: skip

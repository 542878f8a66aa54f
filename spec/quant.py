"""Chapter 23. Packed weights: matrices in 8 or 4 bits an element, with the scales that give them back.

    NVFP4   w = e2m1(code) (e4m3(scale) scale_2)    4.5 bits: blocks of 16 columns, one scale_2 a matrix
    FP8     w = e4m3(code) scale                    8 bits: one scale a matrix
    MXFP8   w = e4m3(code) 2^(scale - 127)          8.25 bits: blocks of 32 columns

in float32 and in this order of the multiplications, which is that of NVIDIA's modelopt, bit by bit. e2m1 and
e4m3 are floating point with a sign, 2 or 4 bits of exponent and 1 or 3 of mantissa. Two e2m1 codes share a
byte, the even column in its low half. Trap 8: scales lie row by row, not swizzled, and scale_2 multiplies.
A matrix whose scale_2 is 0 (in FP8: whose scale is 0) is all zeros, for any codes: modelopt writes NaN.

W4A16 and W4A8 are NVFP4 weights whose inputs stay in 16 bits or are rounded to FP8; W4A8 has blocks of 32 and
a larger scale_2. The size of a block follows from the shapes. `with_packed_inputs` is the arithmetic of
hardware that packs the inputs of a layer as well:

    W4A4    x = e2m1(code) (e4m3(scale) input_scale)      W8A8, W4A8    x = e4m3(code) input_scale

where a block of 16 inputs has the scale e4m3(largest / (6 input_scale)). docs/packed.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import gcd, prod

import ml_dtypes
import numpy as np

from refengine.spec.arrays import Array
from refengine.spec.config import InputError
from refengine.spec.numerics import relu2
from refengine.spec.ops import Ops, linear_pair, logits

E2M1_MAX, E4M3_MAX = 6, 448
TOP, TOP_4_OVER_6, TOP_W4A8 = 6 * 448, 6 * 256, 448  # the largest element, in units of scale_2
E4M3_TINY = 2.0**-9  # the smallest scale of a block
BIAS = 127  # of the exponents of MXFP8
MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1 = np.array(MAGNITUDES + [-m if m else 0 for m in MAGNITUDES], np.float32)  # code -> value
BORDERS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)  # between neighbours of MAGNITUDES
PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=1)  # byte -> values of its two columns,
PAIRS = PAIRS.view(np.uint64)[:, 0]  # looked up as one number of 8 bytes


def _e4m3() -> Array:
    """Return [256] float32: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f is NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    value[127] = np.nan
    return np.concatenate([value, -value]).astype(np.float32)


E4M3 = _e4m3()


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight [.. o i]; slices of rows, and of columns, are packed weights.

    kind         "NVFP4", "FP8" or "MXFP8"
    codes        uint8 [.. o i/2] (NVFP4), else [.. o i]
    scale        uint8 [.. o i/block], codes of E4M3 (NVFP4) or exponents (MXFP8); float32 [] (FP8)
    scale_2      float32 [], of NVFP4 alone
    input_scale  float32 [], for `rounded_inputs`; None where inputs are not packed
    whole_block  the block before a cut of columns made `block` smaller: inputs are packed by it; 0: `block`
    """

    kind: str
    codes: Array
    scale: Array
    scale_2: np.float32 | None = None
    input_scale: np.float32 | None = None
    whole_block: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the matrix."""
        *rows, last = self.codes.shape
        return (*rows, last * (2 if self.kind == "NVFP4" else 1))

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes + (4 if self.kind == "NVFP4" else 0)

    @property
    def block(self) -> int:
        """Return the columns that share a scale; with one scale a matrix, all of them."""
        return self.shape[-1] // (self.scale.shape[-1] or 1) if self.scale.ndim else self.shape[-1]

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, at) -> Packed:
        """Return rows `at` (of any form), or with a slice for the last axis also a run of columns."""
        if not (isinstance(at, tuple) and len(at) == self.ndim):
            scale = self.scale[at] if self.scale.ndim else self.scale
            return replace(self, codes=self.codes[at], scale=scale)
        *rows, columns = at
        start, stop, step = columns.indices(self.shape[-1])
        each = 2 if self.kind == "NVFP4" else 1  # columns of a byte
        if step != 1 or start % each or stop % each:
            raise InputError(f"columns {start} to {stop} of {self.kind} weights are not whole bytes")
        part = replace(self, codes=self.codes[(*rows, slice(start // each, stop // each))])
        if not self.scale.ndim:
            return part
        whole = self.in_blocks(gcd(self.block, start, stop))
        scale = whole.scale[(*rows, slice(start // whole.block, stop // whole.block))]
        return replace(part, scale=scale, whole_block=whole.whole_block)

    def in_blocks(self, block: int) -> Packed:
        """Return the same matrix with blocks of a divisor of their size: scales are repeated."""
        scale = np.repeat(self.scale, self.block // (block or 1), axis=-1)
        return replace(self, scale=scale, whole_block=self.whole_block or self.block)

    def joined(self, others: list[Packed], axis: int) -> Packed:
        """Return this and other slices of one matrix, end to end along an axis."""
        parts = [self, *others]
        codes = np.concatenate([part.codes for part in parts], axis)
        if not self.scale.ndim:
            return replace(self, codes=codes)
        block = gcd(*(part.block for part in parts))
        return replace(
            self, codes=codes, scale=np.concatenate([p.in_blocks(block).scale for p in parts], axis)
        )

    def dequantize(self, dtype=np.float32) -> Array:
        """Return the matrix: computed in float32, then in `dtype`."""
        if self.kind == "FP8":
            table = E4M3 * self.scale if self.scale else np.zeros_like(E4M3)
            return table[self.codes].astype(dtype, copy=False)
        if self.kind == "NVFP4":
            values, scale = PAIRS[self.codes].view(np.float32), E4M3[self.scale] * self.scale_2
            if not self.scale_2:
                return np.zeros(self.shape, dtype)
        else:
            values, scale = E4M3[self.codes], np.ldexp(np.float32(1), self.scale.astype(np.int32) - BIAS)
        blocks = values.reshape(*self.scale.shape, self.block)
        blocks *= scale[..., None]
        return blocks.reshape(self.shape).astype(dtype, copy=False)


def nvfp4(w: Array, amax=None, block: int = 16, top: int = TOP, four_over_six=False) -> Packed:
    """Return w [.. i] in NVFP4, with scale_2 = amax / top; the largest element of a block becomes 6.

    amax           the largest magnitude of the matrix, of which w may be a part, or of several that share it
    block, top     of W4A8 32 and TOP_W4A8
    four_over_six  where that is closer, the largest of a block becomes 4 instead; `top` is TOP_4_OVER_6
    """
    top = TOP_4_OVER_6 if four_over_six else top
    amax = np.float32(np.max(np.abs(w), initial=0) if amax is None else amax)
    scale_2 = amax / np.float32(top)
    blocks = w.astype(np.float32).reshape(*w.shape[:-1], -1, block)
    if not scale_2:
        codes = np.zeros((*w.shape[:-1], w.shape[-1] // 2), np.uint8)
        return Packed("NVFP4", codes, np.full(blocks.shape[:-1], 0x38, np.uint8), np.float32(1))
    largest = np.abs(blocks).max(axis=-1)
    if four_over_six:
        largest = np.where(_closer_at_four(blocks, largest, amax), largest * np.float32(1.5), largest)
        wanted = largest / np.float32(E2M1_MAX)
        wanted = (
            np.where(wanted == 0, np.float32(1), wanted)
            * np.float32(top // E2M1_MAX)
            / (amax / np.float32(E2M1_MAX))
        )
        return _coded(blocks, wanted, scale_2)
    return _coded(blocks, largest / (np.float32(E2M1_MAX) * scale_2), scale_2)


def _coded(blocks: Array, wanted: Array, scale_2) -> Packed:
    """Return blocks [.. i/block block] in NVFP4, with the wanted scales as E4M3 has them."""
    scale = to_e4m3(np.where(wanted == 0, np.float32(1), wanted).clip(E4M3_TINY, E4M3_MAX))
    codes = to_e2m1(blocks / (E4M3[scale] * scale_2)[..., None])
    codes = codes.reshape(*blocks.shape[:-2], -1)
    return Packed("NVFP4", codes[..., ::2] | codes[..., 1::2] << 4, scale, scale_2)


def _closer_at_four(blocks: Array, largest: Array, amax) -> Array:
    """Return for each block whether its squared error is smaller with its largest element at 4 than at 6.

    modelopt multiplies in another order here than for the scale that is kept, so that one which lies halfway
    between two numbers of E4M3 may be rounded both ways: such a block may be worse than with 6.
    """
    top = amax * np.float32(TOP / TOP_4_OVER_6) / np.float32(E2M1_MAX)
    up = np.float32(1) / top * np.float32(E4M3_MAX)  # rounded twice, as modelopt does
    errors = []
    for factor in (1, 1.5):
        wanted = largest * np.float32(factor) / np.float32(E2M1_MAX)
        scale = E4M3[to_e4m3((wanted * up).clip(0, E4M3_MAX))] * (1 / up)
        scale = scale[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(scale > 0, E2M1[to_e2m1(blocks / scale)] * scale, 0)
        squares = np.square(blocks - found)
        halves = squares[..., : blocks.shape[-1] // 2] + squares[..., blocks.shape[-1] // 2 :]
        errors.append(np.cumsum(halves, axis=-1)[..., -1])  # torch's order with vectors of 8: it decides ties
    return errors[1] < errors[0]


def fp8(w: Array, amax=None) -> Packed:
    """Return w in FP8; the quotients are rounded to the dtype of w first, as modelopt does."""
    amax = np.float32(np.max(np.abs(w), initial=0) if amax is None else amax)
    scale = amax / np.float32(E4M3_MAX)
    if not scale:
        return Packed("FP8", np.zeros(w.shape, np.uint8), np.array(1, np.float32))
    return Packed("FP8", to_e4m3((w.astype(np.float32) / scale).astype(w.dtype)), np.array(scale))


def mxfp8(w: Array, block: int = 32) -> Packed:
    """Return w [.. i] in MXFP8: the smallest power of two that keeps a block within 448."""
    blocks = w.astype(np.float32).reshape(*w.shape[:-1], -1, block)
    largest = np.abs(blocks).max(axis=-1) / np.float32(E4M3_MAX)
    with np.errstate(divide="ignore"):
        exponent = np.ceil(np.log2(largest)).clip(-BIAS, BIAS)
    scaled = blocks * np.ldexp(np.float32(1), -exponent.astype(np.int32))[..., None]
    codes = to_e4m3(scaled.clip(-E4M3_MAX, E4M3_MAX)).reshape(w.shape)
    return Packed("MXFP8", codes, (exponent + BIAS).astype(np.uint8))


def to_e2m1(x: Array) -> Array:
    """Return the nearest E2M1 codes; ties go to the even code, and magnitudes above 6 become 6."""
    magnitude = np.abs(x)
    code = (x < 0).astype(np.uint8) << 3
    for i, border in enumerate(BORDERS):
        code += magnitude >= border if i % 2 else magnitude > border
    return code


def to_e4m3(x: Array) -> Array:
    """Return the nearest E4M3 codes, ties to even; beyond 464 a NaN."""
    return x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def rounded_fp8(x: Array, scale) -> Array:
    """Return x as it is after FP8 with a given scale: inputs of FP8 weights, keys and values of a cache."""
    codes = to_e4m3((x.astype(np.float32) / np.float32(scale)).clip(-E4M3_MAX, E4M3_MAX))
    return (E4M3[codes] * np.float32(scale)).astype(x.dtype)


def rounded_inputs(x: Array, weight: Packed) -> Array:
    """Return inputs x [.. i] of a packed weight as hardware that packs them reads them."""
    block = weight.whole_block or weight.block
    if weight.input_scale is None:
        return x
    if weight.kind == "FP8" or block != 16:  # W4A8
        return rounded_fp8(x, weight.input_scale)
    if x.shape[-1] % block:
        raise InputError(f"{x.shape[-1]} inputs are not whole blocks of {block}: they cannot be packed so")
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block)
    wanted = np.abs(blocks).max(axis=-1) / (np.float32(E2M1_MAX) * weight.input_scale)
    return _coded(blocks, wanted, weight.input_scale).dequantize(x.dtype)


def with_packed_inputs(ops: Ops) -> Ops:
    """Return NumPy operations that also pack the inputs of packed weights which have an input_scale."""

    def linear(x, weight):
        if isinstance(weight, tuple):
            return np.concatenate([linear(x, part) for part in weight], axis=-1)
        return ops.linear(rounded_inputs(x, weight) if isinstance(weight, Packed) else x, weight)

    def mlp(h, up, down):
        return linear(relu2(linear(h, up)), down)

    def experts(u, matrices, routing, first=0):
        y = np.zeros_like(u)
        for i in np.unique(routing.expert):
            if 0 <= i - first < len(matrices):
                chosen = routing.expert == i  # *b k
                hit, weight = chosen.any(axis=-1), (routing.weight * chosen).sum(axis=-1)
                y[hit] += (weight[hit][:, None] * mlp(u[hit], *matrices[i - first])).astype(u.dtype)
        return y

    pair, head = (partial(verb, product=linear) for verb in (linear_pair, logits))
    return replace(ops, linear=linear, linear_pair=pair, mlp=mlp, experts=experts, logits=head)

"""Chapter 5. Numerics: the precision of each value, and the tolerance between two correct results.

Everything is computed in the dtype it is given, but these are kept in float32 or wider, in every backend
(their names are explained in the chapters of the last column):

    value                             reason                                                    chapter
    mean of squares, rsqrt            a sum over thousands of channels                          norm
    A_log, dt_bias, dt, exp(dt A)     bfloat16 cannot represent a decay of 0.9999               scan
    the state S                       every position adds to it, so errors accumulate           scan
    router logits, scores, bias       rounding can change the order of two experts              moe
    softmax of the attention          a sum over the whole context                              attention
    logits                            sampling compares them                                    model

A sequence's memory may be stored in fewer bits than it is computed in: keys and values in bfloat16 or FP8
(`Stored`), S in float16 with stochastic rounding (`to_half`). docs/numerics.md has the measured consequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from refengine.spec.arrays import DTYPES, Array, Float, widen


def wide(dtype) -> np.dtype:
    """Return float32, or `dtype` when that is wider still."""
    return np.promote_types(dtype, np.float32)


def tolerance(dtype, terms: int) -> float:
    """Return how far a sum of `terms` products, accumulated in `dtype`, may lie from the exact one.

    The caller multiplies it by the largest value of the result, where that is above 1. Rounding errors of a
    long sum add up like a random walk, so they grow with the square root of its length; the factor 4 leaves
    room for the tail of that walk and for a different order of summation.
    """
    return 4.0 * float(ml_dtypes.finfo(dtype).eps) * max(1.0, terms) ** 0.5


def softplus(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return log(1 + exp(x)), without overflow."""
    return np.logaddexp(x, x.dtype.type(0))


def sigmoid(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return 1 / (1 + exp(-x)); exp may overflow to infinity, and 1 / inf is the right 0."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def silu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return x sigmoid(x)."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def relu2(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Return max(x, 0)^2: the only activation of the experts and of the MLP. (Trap 5: there is no gate.)"""
    x = np.maximum(x, 0)
    return x * x


FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
KV_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "fp8": FP8}  # of a cache, by option
SSM_DTYPES = ("float32", "float16")  # of S


@dataclass(frozen=True)
class Stored:
    """Converts keys and values to and from the dtype of a cache; FP8 holds them divided by their scales."""

    dtype: np.dtype
    k_scale: float = 1.0
    v_scale: float = 1.0

    def scaled(self, k_scale: float, v_scale: float) -> Stored:
        """Return the same with other scales; only FP8 has any."""
        return replace(self, k_scale=k_scale, v_scale=v_scale) if self.dtype == FP8 else self

    def narrow(self, x: Array, scale: float) -> Array:
        """Return x in the stored dtype, rounded to nearest even.

        FP8 is cut off at 448 times the scale; an x that is FP8 already is returned as it is.
        """
        if self.dtype == FP8 != x.dtype:
            x = (x.astype(np.float32, copy=False) / np.float32(scale)).clip(-448, 448)
        return x.astype(self.dtype, copy=False)

    def wide(self, x: Array, scale: float, dtype) -> Array:
        """Return stored numbers in the dtype of the computation, FP8 times its scale."""
        x = widen(x, dtype)
        return x * x.dtype.type(scale) if self.dtype == FP8 else x


def mix(x: Array) -> Array:
    """Return a hash of uint32 numbers: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def rounding_key(seeds, layer: int) -> Array:
    """Return a key a sequence, [b] uint32, for the random numbers that round S: a hash of seed and layer."""
    seeds = np.asarray(seeds, np.uint64)
    key = np.zeros(seeds.shape, np.uint32)
    for word in (seeds, seeds >> np.uint64(32), np.full(seeds.shape, layer)):
        key = mix((word.astype(np.uint32) ^ key) + np.uint32(0x9E3779B9))
    return key


def random_bits(key: Array, position: Array, count: int) -> Array:
    """Return [b count] random uint32 below 2^13, which depend only on key, position and element."""
    step = mix((np.asarray(position).astype(np.uint32) ^ key) + np.uint32(0x9E3779B9))[:, None]
    return mix(mix(np.arange(count, dtype=np.uint32) ^ step) + step) >> np.uint32(19)


def to_half(x: Array, bits: Array) -> Array:
    """Return x in float16, rounded up or down at random, so that the mean over `bits` is x.

    A number a quarter of the way between two float16 numbers is rounded up once in four times. Rounding to
    nearest would instead lose each addition to S that is below half a unit. `bits` has a random number below
    2^13 for each element, because float16 drops 13 bits. Magnitudes are cut off at 65504.
    """
    x = x.astype(np.float32, copy=False)
    size = np.abs(x)
    normal = ((size.view(np.uint32) + bits) & np.uint32(0xFFFFE000)).view(np.float32)
    small = np.floor(size * np.float32(2**24) + bits.astype(np.float32) / np.float32(2**13)) / np.float32(
        2**24
    )
    size = np.where(size < 2.0**-14, small, np.where(np.isnan(x), x, normal))
    return np.copysign(np.minimum(size, np.float32(65504)), x).astype(np.float16)

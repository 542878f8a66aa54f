"""Chapter 5. Numerics: where the model rounds, and how far two right answers may differ.

Everything is computed in the dtype it is given, but these are kept in float32 or wider, in every backend:

    what                              why                                                       chapter
    mean of squares, rsqrt            a sum over thousands of channels                          norm
    A_log, dt_bias, dt, exp(dt A)     a decay of 0.9999 is not a bfloat16                       scan
    the state S                       it is added to at every step of the sequence              scan
    router logits, scores, bias       the order of two experts is decided in the last bits      moe
    softmax of the attention          a sum over the whole context                              attention
    logits                            sampling compares them                                    model

docs/numerics.md has the measured consequences.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from refengine.spec.arrays import Array, Float


def wide(dtype) -> np.dtype:
    """Return float32, or `dtype` when that is wider still."""
    return np.promote_types(dtype, np.float32)


def tolerance(dtype, terms: int) -> float:
    """Return how far a sum of `terms` products, accumulated in `dtype`, may lie from the exact one.

    Times the largest value of the result, where that is above 1. Rounding errors of a long sum add up like a
    random walk, so they grow with the square root of its length; the factor 4 leaves room for the tail of
    that walk and for a different order of summation.
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

"""Chapter 4. Arrays: the letters of every shape, and the few reshapes that the model needs.

    b  sequences in the batch     l  positions in this call     d  hidden_size      v  vocab_size
    h  heads                      p  Mamba head_dim             n  ssm_state_size   g  n_groups
    e  attention head_dim         c  conv channels              t  positions remembered
    kv key/value heads            r  heads that share one       q i j  positions in a chunk
    E  experts                    k  experts of a token         x  width an expert reads
    i o  widths of a matrix product, in and out                 f  inner width of an MLP

An activation is `b l d`. A decode step has `l = 1`; a prompt may be read in calls of any `l`. Rows
of a batch may have different lengths: `lengths[b]` is the number of real positions among the `l` of each row
(None: all). `'` is the transpose of a matrix.

A shape in a signature, as in Float[Array, "*b d"], is checked by the tests and ignored otherwise; `*b`
or `*s` stands for any number of axes. A comment at the end of a line, as in `# b l d`, is the shape of the
array that the line makes. In the convolution (chapter 7) k is the length of the filter, and t is k - 1.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # which checks shapes, as the tests ask it to
    from jaxtyping import Float, Int
else:  # its import takes as long as NumPy's

    class Float:
        """An array and its shape, as a comment: Float[Array, "b l d"] is an Array."""

        def __class_getitem__(cls, what: tuple):
            return what[0]

    Int = Float

Array = np.ndarray
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}  # fmt: skip
ITEMSIZE = {dtype.name: dtype.itemsize for dtype in DTYPES.values()}  # "bfloat16": 2, ...


@runtime_checkable
class PackedWeight(Protocol):
    """A matrix in fewer bits, of chapter 23; slices of it are packed too."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the matrix."""
        ...

    def __getitem__(self, at) -> Any:
        """Return rows, and a run of columns, of the matrix."""
        ...

    def joined(self, others: list, axis: int) -> Any:
        """Return this and other slices, end to end along an axis."""
        ...

    def dequantize(self, dtype) -> Array:
        """Return the matrix."""
        ...


Weight = Array | PackedWeight


def widen(a: Weight, dtype) -> Array:
    """Return `a` in the (wider) dtype of the computation; weights stay in the file's form until then."""
    if not isinstance(a, np.ndarray):
        return a.dequantize(dtype)
    if a.dtype == dtype:
        return a
    if a.dtype == DTYPES["BF16"] and dtype == np.float32:  # a bfloat16 is the upper half of a float32
        bits = a.view(np.uint16).astype(np.uint32)
        bits <<= 16  # in place: the matrix may be large
        return bits.view(np.float32)
    return a.astype(dtype)


def join(parts: list, axis: int) -> Weight:
    """Return slices of a weight, packed or not, end to end along an axis."""
    first, *others = parts
    return np.concatenate(parts, axis) if isinstance(first, np.ndarray) else first.joined(others, axis)


def split(x, widths):
    """Return the last axis cut into pieces of these widths."""
    ends = np.cumsum(widths)
    return [x[..., end - width : end] for width, end in zip(widths, ends, strict=True)]


def heads(x, count: int):
    """Return b l (h e) as b l h e."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)


def merge(x):
    """Return b l h e as b l (h e)."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def valid_positions(lengths, count: int):
    """Return [b l] bool: which of `count` positions of each row are real. None when all are."""
    return None if lengths is None else np.arange(count) < np.asarray(lengths)[:, None]

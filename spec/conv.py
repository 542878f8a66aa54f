"""Chapter 7. The causal convolution: a filter over the last K values of each channel, then SiLU.

    y[t] = silu(bias + sum_j w[j] x[t - K + 1 + j]),   j = 0 .. K-1;   w[K-1] meets the current token

With K = 4, which every release has, y[9] reads x[6] to x[9] of its own channel. Before the sequence begins
there are zeros. The state is the last K - 1 rows of x, *before* the activation: the `tail`. The channels are
x | B | C of the Mamba mixer, side by side (chapter 8 explains them). docs/model.md, "Mamba-2".
"""

from __future__ import annotations

import numpy as np

from refengine.spec.arrays import Array, Float, Int
from refengine.spec.numerics import silu


def causal_conv(
    x: Float[Array, "b l c"],
    weight: Float[Array, "c 1 k"],
    bias: Float[Array, " c"],
    tail: Float[Array, "b t c"],
    lengths: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, "b l c"], Float[Array, "b t c"]]:
    """Return y and the tail after the last real position.

    The axis of length 1 in `weight` is PyTorch's: a channel reads one channel, itself.
    """
    length, remembered = x.shape[1], tail.shape[1]
    window = np.concatenate([tail.astype(x.dtype, copy=False), x], axis=1)  # b t+l c
    y = bias + sum(weight[:, 0, j] * window[:, j : j + length] for j in range(remembered + 1))  # b l c
    if lengths is None:
        tail = window[:, length:]
    else:
        tail = window[np.arange(len(x))[:, None], np.asarray(lengths)[:, None] + np.arange(remembered)]
    return silu(y.astype(x.dtype, copy=False)), tail  # b l c   b t c

"""Chapter 6. Norms: RMSNorm before every layer, and a gated norm inside the Mamba mixer.

    rms_norm:        y = x / sqrt(mean(x^2) + eps) * w                      over the d channels
    gated_rms_norm:  u = y silu(z),  then the same, over each of g groups   (trap 2: the gate comes first)

z is the gate of the Mamba mixer (chapter 13), as wide as the output y of the scan. The g groups are those of
the Mamba heads that share B and C (chapter 8). Weights multiply as they are (w, not 1 + w). Statistics are
in float32 or wider. docs/model.md, "Norms".
"""

from __future__ import annotations

import numpy as np

from refengine.spec.arrays import Array, Float, heads, merge
from refengine.spec.numerics import silu, wide


def rms_norm(
    x: Float[Array, "*b d"], delta: Float[Array, "*b d"] | None, weight: Float[Array, " d"], eps: float
) -> tuple[Float[Array, "*b d"], Float[Array, "*b d"]]:
    """Add the output of the layer before (`delta`) to the residual stream `x`, and normalise the sum.

    Returns (normalised, x + delta). The addition belongs to this operation because
    fused kernels do both at once.
    """
    x = x if delta is None else x + delta
    u = x.astype(wide(x.dtype), copy=False)
    return (u / rms(u, eps) * weight).astype(x.dtype, copy=False), x


def gated_rms_norm(
    y: Float[Array, "b l c"],
    z: Float[Array, "b l c"],
    weight: Float[Array, " c"],
    eps: float,
    groups: int,
    mean=lambda squares: squares,
) -> Float[Array, "b l c"]:
    """Gate `y` by `z`, then normalise each group of c / groups channels by itself.

    Where ranks hold parts of a group, `mean` averages the mean of squares over these ranks (chapter 22).
    """
    dtype = wide(y.dtype)
    u = heads(y.astype(dtype, copy=False) * silu(z.astype(dtype, copy=False)), groups)  # b l g c/g
    return (merge(u / rms(u, eps, mean)) * weight).astype(y.dtype, copy=False)  # b l c


def rms(u, eps, mean=lambda squares: squares):
    """Return sqrt(mean(u^2) + eps) over the last axis, which stays with length 1."""
    return np.sqrt(mean(np.einsum("...d,...d->...", u, u)[..., None] / u.shape[-1]) + eps)

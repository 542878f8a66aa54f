"""Chapter 8. The state-space scan: each head keeps a matrix, which decays and to which every position adds.

    S[t] = exp(dt A) S[t-1] + dt x[t] B[t]'          y[t] = S[t] C[t] + D x[t]
    dt   = softplus(dt_raw + dt_bias)                A = -exp(A_log) < 0

    x    values to store: h heads of p numbers       S    state of a head, p x n
    B C  directions to write and to read: n numbers   dt   step: how strongly to write and to forget

All of these but S come from the token, through `in_proj`, and x, B and C then through the convolution
(chapter 13). A, D and dt_bias are learnt, one number for each head. Heads share B and C by groups, as query
heads share keys: head i reads group i // (h / g). docs/mamba2.md builds the recurrence from an example.

`ssd_scan` is this recurrence: the definition. `ssd_scan_chunked` computes a chunk of positions at
once with matrix products: a theorem, which here means a faster form of a definition, held equal to it by
tests on drawn inputs. (SSD: state-space duality, by which the recurrence is also an attention with a decaying
mask.) Both ignore padding: beyond lengths[b], dt = 0, so the state does not change. No release clamps dt:
its limits are (0, inf) (trap 1).
docs/model.md, "Mamba-2"; arXiv 2405.21060, section 6.
"""

from __future__ import annotations

import math

import numpy as np

from refengine.spec.arrays import Array, Float, Int, valid_positions
from refengine.spec.numerics import softplus, wide


def time_steps(
    dt: Float[Array, "b l h"],
    dt_bias: Float[Array, " h"],
    lengths: Int[Array, " b"] | None,
    dt_limit: tuple[float, float],
) -> Float[Array, "b l h"]:
    """Return the step dt of each head at each position, 0 at padding."""
    dt = softplus(dt.astype(wide(dt.dtype), copy=False) + dt_bias)
    if dt_limit != (0.0, math.inf):
        dt = np.clip(dt, *dt_limit)
    valid = valid_positions(lengths, dt.shape[1])
    return dt if valid is None else np.where(valid[..., None], dt, dt.dtype.type(0))


def ssd_scan(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A_log: Float[Array, " h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, " h"],
    dt_bias: Float[Array, " h"],
    S: Float[Array, "b h p n"],
    lengths: Int[Array, " b"] | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Return y and the state after the last real position, by the definition: the recurrence."""
    dt = time_steps(dt, dt_bias, lengths, dt_limit)  # b l h
    A = -np.exp(A_log)  # h
    B, C = (np.repeat(m, x.shape[2] // m.shape[2], axis=2) for m in (B, C))  # b l h n
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        decay = np.exp(dt[:, t] * A)[..., None, None]  # b h 1 1
        S = decay * S + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]  # b h p n
        y[:, t] = (S @ C[:, t, ..., None])[..., 0] + D[:, None] * x[:, t]  # b h p
    return y, S


def ssd_scan_chunked(
    x: Float[Array, "b l h p"],
    dt: Float[Array, "b l h"],
    A_log: Float[Array, " h"],
    B: Float[Array, "b l g n"],
    C: Float[Array, "b l g n"],
    D: Float[Array, " h"],
    dt_bias: Float[Array, " h"],
    S: Float[Array, "b h p n"],
    lengths: Int[Array, " b"] | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk: int = 128,
) -> tuple[Float[Array, "b l h p"], Float[Array, "b h p n"]]:
    """Return the same (the theorem), with one Python step a chunk instead of one a position."""
    if x.shape[1] == 1:
        return ssd_scan(x, dt, A_log, B, C, D, dt_bias, S, lengths, dt_limit)
    dt = time_steps(dt, dt_bias, lengths, dt_limit)  # b l h
    A = -np.exp(A_log)  # h
    y = np.empty_like(x)
    for start in range(0, x.shape[1], chunk):
        q = slice(start, start + chunk)
        y[:, q], S = one_chunk(x[:, q], dt[:, q], A, B[:, q], C[:, q], S)
    y += D[:, None] * x
    return y, S


def one_chunk(x, dt, A, B, C, S):
    """Return y (b q h p), without D x, and the next S of one chunk. For its positions i and j

        y[i] = sum_{j<=i} (C[i].B[j]) L[i,j] dt[j] x[j]  +  exp(a[i]) S C[i],

    where S is the incoming state, a[i] the sum of dt A from the beginning of the chunk to i, and
    L[i,j] = exp(a[i] - a[j]) the decay from j to i.
    """
    (b, q, h, p), (g, n) = x.shape, B.shape[2:]
    r = h // g  # heads that share a group
    a = np.cumsum(dt * A, axis=1, dtype=np.float64)  # b q h: differences of large sums, so in float64
    a = a.reshape(b, q, g, r).transpose(0, 2, 3, 1)  # b g r q
    u = (dt[..., None] * x).reshape(b, q, g, r, p).transpose(0, 2, 3, 1, 4)  # b g r q p
    B, C = B.transpose(0, 2, 1, 3), C.transpose(0, 2, 1, 3)  # b g q n
    # WITHIN the chunk: attention-like, masked by causality and weighted by the decay
    later = np.tri(q, dtype=bool)  # i >= j
    between = np.where(later, a[..., :, None] - a[..., None, :], -np.inf)  # b g r i j
    L = np.exp(between.astype(x.dtype))
    y = (L * (C @ B.swapaxes(-1, -2))[:, :, None]) @ u  # b g r q p
    # FROM BEFORE: the incoming state, decayed to each position
    S = S.reshape(b, g, r * p, n)
    before = (C @ S.swapaxes(-1, -2)).reshape(b, g, q, r, p).transpose(0, 1, 3, 2, 4)  # b g r q p
    y = y + np.exp(a).astype(x.dtype)[..., None] * before
    # ONWARDS: the state decayed over the chunk, plus each position decayed to the chunk's end
    u = u * np.exp(a[..., -1:] - a).astype(x.dtype)[..., None]  # b g r q p
    added = u.swapaxes(-1, -2).reshape(b, g, r * p, q) @ B  # b g (r p) n
    S = np.repeat(np.exp(a[..., -1]).astype(S.dtype), p, axis=-1)[..., None] * S + added
    return y.transpose(0, 3, 1, 2, 4).reshape(b, q, h, p), S.reshape(b, h, p, n)

"""Chapter 10. Attention without positions: keys and values are found by content alone, not by their place.

    y[i] = sum_{j <= i} softmax_j(q[i] . k[j] / sqrt(e)) v[j]

Here e is head_dim. The mixer of chapter 13 makes q, k and v by `q_proj`, `k_proj` and `v_proj`, as in a
transformer. Query head i reads key/value head i // (heads / kv heads). There is no rotary or other position
signal anywhere (trap 3: `rope_theta` in the file is unused); the order of tokens comes from the Mamba
layers. Scores and softmax are in float32 or wider. docs/model.md, "Attention".
"""

from __future__ import annotations

import numpy as np

from refengine.spec.arrays import Array, Float, Int
from refengine.spec.numerics import wide
from refengine.spec.state import Cache


def attention(
    q: Float[Array, "b l h e"],
    k: Float[Array, "b l kv e"],
    v: Float[Array, "b l kv e"],
    cache: Cache,
    lengths: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, "b l h e"], Cache]:
    """Return y and the next cache, by the definition: each position attends to all up to its own."""
    position = cache.length[:, None] + np.arange(q.shape[1])  # b l
    cache = cache.append(k, v, lengths)
    return attend(q, position, *cache.upto(int(position.max()) + 1)), cache


def attention_in_blocks(
    q: Float[Array, "b l h e"],
    k: Float[Array, "b l kv e"],
    v: Float[Array, "b l kv e"],
    cache: Cache,
    lengths: Int[Array, " b"] | None = None,
    block: int = 64,
) -> tuple[Float[Array, "b l h e"], Cache]:
    """Return the same (the theorem), a block of positions at a time, which reads no key beyond the block."""
    position = cache.length[:, None] + np.arange(q.shape[1])  # b l
    cache = cache.append(k, v, lengths)
    y = np.empty_like(q)
    for start in range(0, q.shape[1], block):
        rows = slice(start, start + block)
        y[:, rows] = attend(q[:, rows], position[:, rows], *cache.upto(int(position[:, rows].max()) + 1))
    return y, cache


def attend(
    q: Float[Array, "b l h e"],
    position: Int[Array, "b l"],
    K: Float[Array, "b t kv e"],
    V: Float[Array, "b t kv e"],
) -> Float[Array, "b l h e"]:
    """Return softmax(q K' / sqrt(e)) V, where the query at `position` sees the keys at 0 .. position."""
    (b, length, h, e), (t, kv) = q.shape, K.shape[1:3]
    r, dtype = h // kv, wide(q.dtype)
    # the r query heads that share a key head are rows of one matrix product: no key is repeated in memory
    rows = q.reshape(b, length, kv, r, e).transpose(0, 2, 3, 1, 4).reshape(b, kv, r * length, e)
    scores = (rows @ K.transpose(0, 2, 3, 1)).astype(dtype, copy=False) / np.sqrt(e).astype(dtype)
    scores = scores.reshape(b, kv, r, length, t)
    visible = np.arange(t) <= position[..., None]  # b l t
    if not visible.all():
        scores = np.where(visible[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = (p / p.sum(axis=-1, keepdims=True)).reshape(b, kv, r * length, t).astype(V.dtype, copy=False)
    y = (p @ V.transpose(0, 2, 1, 3)).reshape(b, kv, r, length, e)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, length, h, e)

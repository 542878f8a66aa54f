"""Chapter 10. Attention without positions: what was said is looked up by what it is, not by where it stood.

    y[i] = sum_{j <= i} softmax_j(q[i] . k[j] / sqrt(e)) v[j]

Query head i reads key/value head i // (heads / kv heads). There is no rotary or other position signal
anywhere (trap 3: `rope_theta` in the file is inert); order comes from the Mamba layers. Scores and
softmax are in float32 or wider. docs/model.md, "Attention".
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from spec.arrays import Array
from spec.numerics import wide
from spec.state import Cache


def attention(
    q: Float[Array, "b l h e"],
    k: Float[Array, "b l kv e"],
    v: Float[Array, "b l kv e"],
    cache: Cache,
    n: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, "b l h e"], Cache]:
    """Append k and v to the cache, then attend from each position to all up to its own."""
    b, length, h, e = q.shape
    kv = k.shape[2]
    position = cache.length[:, None] + np.arange(length)  # b l
    cache = cache.append(k, v, n)
    K, V = cache.upto(int(position.max()) + 1)  # b t kv e
    visible = np.arange(K.shape[1]) <= position[..., None]  # b l t
    # the r query heads that share a key head are rows of one matrix product: no key is repeated in memory
    r, dtype = h // kv, wide(q.dtype)
    rows = q.reshape(b, length, kv, r, e).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, e)  # b kv (r l) e
    scores = (rows @ K.transpose(0, 2, 3, 1)).astype(dtype, copy=False) / np.sqrt(e).astype(dtype)
    scores = scores.reshape(b, kv, r, length, -1)  # b kv r l t
    if length > 1 or not visible.all():
        scores = np.where(visible[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    p = p.reshape(b, kv, r * length, -1).astype(v.dtype, copy=False)
    y = (p @ V.transpose(0, 2, 1, 3)).reshape(b, kv, r, length, e)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, length, h, e), cache

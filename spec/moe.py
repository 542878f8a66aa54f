"""Chapter 11. Experts: a router selects a few of many small MLPs for each token; their outputs are summed.

    s = sigmoid(h W_gate')                  one score per expert, in float32 or wider, from the full-width h
    chosen = the k largest of s + bias      the bias balances load: it affects the choice, not w
    w = s[chosen] / sum(s[chosen]) * scale  (no division where norm_topk_prob is false)

    u = h fc1'                              the latent of LatentMoE; in a plain MoE u = h and y has no fc2
    r = sum over chosen of  w relu(u up')^2 down'
    y = r fc2'  +  relu(h up_s')^2 down_s'

h is the residual stream after the norm of the layer (not a head); `W_gate` is the router's matrix,
`gate.weight` in a checkpoint, and no gate like z of Mamba; `scale` is `routed_scaling_factor`. An expert is
`up` and `down`; `up_s` and `down_s` are the shared expert, which every token uses.

Trap 6: the router and the shared expert read h at full width; only the routed experts read u. With several
groups of experts (`n_group`), only the best `topk_group` groups are candidates.

This chapter has the router and the experts; the mixer of chapter 13 composes them. docs/model.md,
"Experts".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from refengine.spec.arrays import Array, Float, Int, Weight, widen
from refengine.spec.config import Config
from refengine.spec.numerics import relu2, sigmoid, wide


class Routing(NamedTuple):
    """The experts of each token and their weights, in arrays of the backend whose `route` made them."""

    expert: Any  # *b k, whole numbers
    weight: Any  # *b k, float32 or wider


def route(h: Float[Array, "*b d"], gate: Weight, bias: Float[Array, " E"], cfg: Config) -> Routing:
    """Return `num_experts_per_tok` experts for each token; on a tie the lowest index wins."""
    dtype = wide(h.dtype)
    s = sigmoid(h.astype(dtype, copy=False) @ widen(gate, dtype).T)  # *b E
    c = s + bias
    if cfg.n_group > 1:
        c = only_best_groups(c, cfg.n_group, cfg.topk_group)
    expert = largest(c, cfg.num_experts_per_tok)  # *b k
    w = np.take_along_axis(s, expert, axis=-1)
    if cfg.norm_topk_prob:
        w = w / (w.sum(axis=-1, keepdims=True) + dtype.type(1e-20))
    return Routing(expert, w * dtype.type(cfg.routed_scaling_factor))


def largest(c: Float[Array, "*b E"], k: int) -> Int[Array, "*b k"]:
    """Return the indices of the k largest, best first; equal ones in order of index."""
    return np.argsort(-c, axis=-1, kind="stable")[..., :k]


def only_best_groups(c: Float[Array, "*b E"], groups: int, keep: int) -> Float[Array, "*b E"]:
    """Return c, -inf outside the `keep` best groups; a group scores the sum of its two best experts."""
    by_group = c.reshape(*c.shape[:-1], groups, -1)  # *b groups E/groups
    score = np.sort(by_group, axis=-1)[..., -2:].sum(axis=-1)  # *b groups
    kept = np.zeros(score.shape, bool)
    np.put_along_axis(kept, largest(score, keep), True, axis=-1)
    return np.where(kept[..., None], by_group, -np.inf).reshape(c.shape)


def mlp(h: Float[Array, "*b d"], up: Weight, down: Weight) -> Float[Array, "*b d"]:
    """Return relu(h up')^2 down': an expert, the shared expert, and the dense `-` layer."""
    return relu2(h @ widen(up, h.dtype).T) @ widen(down, h.dtype).T


def experts(
    u: Float[Array, "*b x"], matrices: Sequence, routing: Routing, first: int = 0
) -> Float[Array, "*b x"]:
    """Return the sum over chosen experts of weight mlp(u), by the definition: token by token.

    `matrices[i]` is (up [f x], down [x f]) of expert first + i. An expert that is not
    among them adds nothing: it is on another rank (chapter 22).
    """
    y = np.zeros_like(u)
    for at in np.ndindex(routing.expert.shape):
        i = int(routing.expert[at]) - first
        if 0 <= i < len(matrices):
            y[at[:-1]] += (routing.weight[at] * mlp(u[at[:-1]], *matrices[i])).astype(u.dtype)
    return y


def experts_grouped(
    u: Float[Array, "*b x"], matrices: Sequence, routing: Routing, first: int = 0
) -> Float[Array, "*b x"]:
    """Return the same sum (the theorem) with tokens sorted by expert, so that each expert is read once."""
    k = routing.expert.shape[-1]
    tokens, chosen = u.reshape(-1, u.shape[-1]), routing.expert.reshape(-1) - first
    weight = routing.weight.reshape(-1, 1).astype(u.dtype, copy=False)
    order = np.argsort(chosen, kind="stable")
    y = np.zeros_like(tokens)
    for rows in np.split(order, np.flatnonzero(np.diff(chosen[order])) + 1):
        if len(rows) and 0 <= (i := chosen[rows[0]]) < len(matrices):
            y[rows // k] += weight[rows] * mlp(tokens[rows // k], *matrices[int(i)])  # no token twice
    return y.reshape(u.shape)

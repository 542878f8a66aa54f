"""The equations of the operations, read literally in float64 by code that shares nothing with the spec's.

Each takes a case and float64 arrays of its sizes, and returns the right results. They are slow and plain: a
loop for each row, head or token, a sorted list for a choice. The definitions of the spec agree with them to
the rounding of float64, so an error against a reading is an error against the definition.
"""

from __future__ import annotations

import math

import numpy as np

from refengine.conformance.cases import Case
from refengine.conformance.truth import router_margin, truth

NO_LIMIT = (0.0, math.inf)


def norm(x, weight, eps: float):
    """Return x / sqrt(mean(x^2) + eps) weight, the mean over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def gated_norm(case: Case, y, z, eps: float):
    """Return y silu(z), then normalised over inner / n_groups channels at a time (trap 2). [b l c]"""
    gated, result = y * z / (1 + np.exp(-z)), np.empty_like(y)
    for group in np.split(np.arange(case.cfg.mamba_inner), case.cfg.n_groups):
        result[..., group] = norm(gated[..., group], 1.0, eps)
    return result * case.exact("norm.weight")


def conv(case: Case, x, tail):
    """Return y[t] = silu(bias + sum_j w[j] x[t-K+1+j]) and the next tail; before x comes `tail`. [b l c]"""
    w, bias, K = case.exact("conv1d.weight"), case.exact("conv1d.bias"), case.cfg.conv_kernel
    past = np.concatenate([tail, x], axis=1)
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        u = bias + sum(w[:, 0, K - 1 - ago] * past[:, K - 1 + t - ago] for ago in range(K))
        y[:, t] = u / (1 + np.exp(-u))
    return y, past[:, x.shape[1] :]


def scan(case: Case, x, dt, B, C, S, limit=NO_LIMIT):
    """Return y [b l h p] and the state after it, where

    y[t] = sum_{s<=t} exp(dt[s+1..t] A) dt[s] (C[t].B[s]) x[s]  +  exp(dt[0..t] A) S C[t]  +  D x[t]

    and dt[s..t] is the sum of these steps, added up for each s anew: a difference of sums is less exact.
    """
    A, D, bias = -np.exp(case.exact("A_log")), case.exact("D"), case.exact("dt_bias")
    dt, y, after = np.clip(np.log1p(np.exp(dt + bias)), *limit), np.empty_like(x), np.empty_like(S)
    for b, h in np.ndindex(x.shape[0], x.shape[2]):
        g, steps = h // (x.shape[2] // B.shape[2]), dt[b, :, h]
        decay = np.eye(len(steps))  # t s
        for s in range(len(steps)):
            decay[s + 1 :, s] = np.exp(np.cumsum(steps[s + 1 :]) * A[h])
        since = np.exp(np.cumsum(steps) * A[h])[:, None]  # t 1
        mixed = decay * (C[b, :, g] @ B[b, :, g].T) * steps
        y[b, :, h] = mixed @ x[b, :, h] + since * (C[b, :, g] @ S[b, h].T) + D[h] * x[b, :, h]
        after[b, h] = since[-1] * S[b, h] + (decay[-1] * steps * x[b, :, h].T) @ B[b, :, g]
    return y, after


def attention(q, k, v):
    """Return y [b l h e]: each query attends to the keys up to its own, of its group's key head."""
    y = np.empty_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        kv = h // (q.shape[2] // k.shape[2])
        weight = np.exp(k[b, : i + 1, kv] @ q[b, i, h] / np.sqrt(q.shape[3]))
        y[b, i, h] = weight @ v[b, : i + 1, kv] / weight.sum()
    return y


def route(case: Case, h, block: str = "layers.0") -> dict[int, float]:
    """Return {expert: weight} of one token h [d]: groups first, then experts; on a tie the lowest index."""
    cfg = case.cfg
    s = 1 / (1 + np.exp(-(case.exact("gate.weight", block) @ h)))
    c = s + case.exact("gate.e_score_correction_bias", block)
    members = np.split(np.arange(cfg.n_routed_experts), cfg.n_group)
    if cfg.n_group > 1:
        best = sorted(range(cfg.n_group), key=lambda g: -sum(sorted(c[members[g]])[-2:]))
        members = [members[g] for g in sorted(best[: cfg.topk_group])]
    chosen = sorted(np.concatenate(members).tolist(), key=lambda e: (-c[e], e))[: cfg.num_experts_per_tok]
    total = sum(s[e] for e in chosen) if cfg.norm_topk_prob else 1.0
    return {e: s[e] / total * cfg.routed_scaling_factor for e in chosen}


def mlp(h, up, down):
    """Return down relu(up h)^2 of one token, or of tokens in rows. [.. d]"""
    return np.maximum(h @ up.T, 0) ** 2 @ down.T


def experts(case: Case, h, block: str = "layers.0"):
    """Return the layer of one token h [d]: router and shared expert read h, the others fc1 h (or h)."""

    def w(key):
        return case.exact(key + ".weight", block)

    u, r = w("fc1_latent_proj") @ h if case.moe_latent_size else h, 0
    for e, weight in route(case, h, block).items():
        r = r + weight * mlp(u, w(f"experts.{e}.up_proj"), w(f"experts.{e}.down_proj"))
    r = w("fc2_latent_proj") @ r if case.moe_latent_size else r
    return r + mlp(h, w("shared_experts.up_proj"), w("shared_experts.down_proj"))


def head(case: Case, row: int):
    """Return the prediction head's logits [l v] of a row, and by how much its router chose (trap 7).

    It reads the trunk's hidden after the final norm. transformers leaves the head out, so this reading of the
    paper is the witness.
    """

    def w(name):
        return case.read(name + ".weight").astype(np.float64)

    def normed(x, name):
        return norm(x, w(name), case.layer_norm_epsilon)

    first, second = "mtp.layers.0", "mtp.layers.1"
    e = normed(w("backbone.embeddings")[np.roll(case.ids[row], -1)], f"{first}.enorm")
    g = normed(truth(case, row).hidden, f"{first}.hnorm")
    v = np.concatenate([e, g], axis=-1) @ w(f"{first}.eh_proj").T
    h = normed(v, f"{first}.norm")
    q, k, value = ((h @ w(f"{first}.mixer.{x}_proj").T).reshape(1, len(h), -1, case.head_dim) for x in "qkv")
    v = v + attention(q, k, value).reshape(len(h), -1) @ w(f"{first}.mixer.o_proj").T
    h = normed(v, f"{second}.norm")
    v = v + np.array([experts(case, token, second) for token in h])
    gate, bias = w(f"{second}.mixer.gate"), case.exact("gate.e_score_correction_bias", second)
    o = normed(v, f"{second}.final_layernorm")
    return o @ w("backbone.embeddings" if case.tied else "lm_head").T, router_margin(h, gate, bias, case.cfg)

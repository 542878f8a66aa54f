"""Broken verbs, each a likely misreading, for test_teeth.py to plant."""

from __future__ import annotations

import numpy as np

from spec.attention import attention
from spec.conv import causal_conv
from spec.moe import Routing, largest, mlp, only_best_groups
from spec.norm import gated_rms_norm, rms, rms_norm
from spec.numerics import sigmoid, silu, softplus
from spec.ops import DEFINITION


def scan(x, dt, A_log, B, C, D, dt_bias, S, n, limit, chunk, *, sign=-1, interleaved=False, skip=1, bias_first=True,
         stepped=True, forgets_every=0):
    """The recurrence, with one thing wrong."""
    h, g = x.shape[2], B.shape[2]
    dt = softplus(dt + dt_bias) if bias_first else softplus(dt) + dt_bias
    dt = np.clip(dt, *limit)
    of = np.arange(h) % g if interleaved else np.arange(h) // (h // g)
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        if forgets_every and t and t % forgets_every == 0:
            S = S * 0
        added = (dt[:, t, :, None] if stepped else 1) * x[:, t]
        with np.errstate(over="ignore", invalid="ignore"):
            S = np.exp(dt[:, t] * sign * np.exp(A_log))[..., None, None] * S + added[..., None] * B[:, t, of, None]
            y[:, t] = (S @ C[:, t, of, :, None])[..., 0] + skip * D[:, None] * x[:, t]
    return y, S


def bad_scan(**wrong):
    return lambda *args: scan(*args, **wrong)


def scan_with(change):
    """The right scan of the wrong arguments."""
    names = ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "S", "n", "limit", "chunk")

    def broken(*args):
        given = dict(zip(names, args, strict=True))
        return DEFINITION.ssd_scan(*(given | change(given)).values())

    return broken


def conv_with(weight=lambda w: w, tail=lambda t: t, after=lambda t: t, n=lambda n: n):
    def conv(x, w, bias, t, real=None):
        y, t = causal_conv(x, weight(w), bias, tail(t), n(real))
        return y, after(t)

    return conv


def silu_on_x_only(case):
    """B and C are left as they were convolved."""

    def conv(x, w, bias, tail, n=None):
        window, length = np.concatenate([tail, x], axis=1), x.shape[1]
        plain = bias + sum(w[:, 0, j] * window[:, j : j + length] for j in range(tail.shape[1] + 1))
        y, tail = causal_conv(x, w, bias, tail, n)
        inner = case.cfg.mamba_inner
        return np.concatenate([y[..., :inner], plain[..., inner:].astype(x.dtype)], axis=-1), tail

    return conv


def norm_before_gate(y, z, weight, eps, groups):
    return gated_rms_norm(y, z * 0 + 50, weight, eps, groups) * silu(z)  # silu(50) = 50: the norm divides it out


def norm_over_all(y, z, weight, eps, groups):
    return gated_rms_norm(y, z, weight, eps, 1)


def norm_of_one_plus_w(x, delta, weight, eps):
    return rms_norm(x, delta, weight + 1, eps)


def norm_without_eps(x, delta, weight, eps):
    x = x if delta is None else x + delta
    with np.errstate(invalid="ignore"):
        return x / rms(x, 0) * weight, x


def norm_that_drops_the_residual(x, delta, weight, eps):
    return rms_norm(x if delta is None else delta, None, weight, eps)


def rotary(q, k, v, cache, n=None):
    """The usual rotation of halves, by the position."""

    def turn(a):
        at = cache.length[:, None, None, None] + np.arange(a.shape[1])[:, None, None]
        angle = at / 10000 ** (np.arange(a.shape[-1] // 2) / (a.shape[-1] // 2))
        one, two = np.split(a, 2, axis=-1)
        return np.concatenate([one * np.cos(angle) - two * np.sin(angle), one * np.sin(angle) + two * np.cos(angle)], -1)

    return attention(turn(q).astype(q.dtype), turn(k).astype(k.dtype), v, cache, n)


def attention_with_heads_interleaved(q, k, v, cache, n=None):
    """Query head i reads key head i % kv."""
    order = np.arange(q.shape[2]).reshape(-1, k.shape[2]).T.reshape(-1)
    y, cache = attention(q[:, :, order], k, v, cache, n)
    return y[:, :, np.argsort(order)], cache


def attention_without_scale(q, k, v, cache, n=None):
    return attention(q * np.sqrt(q.shape[-1]).astype(q.dtype), k, v, cache, n)


def attention_to_the_future_too(q, k, v, cache, n=None):
    y, after = attention(q, k, v, cache, n)
    K, V = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in after.upto(int(after.length.max())))
    scores = np.exp(np.einsum("blhe,bthe->bhlt", q, K) / np.sqrt(q.shape[-1]))
    return np.einsum("bhlt,bthe->blhe", scores / scores.sum(-1, keepdims=True), V).astype(y.dtype), after


def router(*, softmax=False, by_bias=False, normalised=None, scaled=True, guard=1e-20, highest=False, groups=True,
           mask=-np.inf, only_one=False):
    """The router, with one thing wrong."""

    def broken(h, gate, bias, cfg):
        logits = h @ gate.T
        s = np.exp(logits - logits.max(-1, keepdims=True)) if softmax else sigmoid(logits)
        s = s / s.sum(-1, keepdims=True) if softmax else s
        c = s + bias
        if cfg.n_group > 1 and groups:
            c = only_best_groups(c, cfg.n_group, cfg.topk_group) if not only_one else best_of_one(c, cfg)
            c = np.where(np.isinf(c), mask, c)
        expert = largest(c, cfg.num_experts_per_tok)
        if highest:
            expert = c.shape[-1] - 1 - largest(c[..., ::-1], cfg.num_experts_per_tok)
        w = np.take_along_axis(c if by_bias else s, expert, axis=-1)
        if cfg.norm_topk_prob if normalised is None else normalised:
            with np.errstate(invalid="ignore"):
                w = w / (w.sum(-1, keepdims=True) + guard)
        return Routing(expert, (w * (cfg.routed_scaling_factor if scaled else 1)).astype(h.dtype))

    return broken


def best_of_one(c, cfg):
    """A group scores its one best expert, not the sum of its two best."""
    by_group = c.reshape(*c.shape[:-1], cfg.n_group, -1)
    kept = np.zeros(by_group.shape[:-1], bool)
    np.put_along_axis(kept, largest(by_group.max(-1), cfg.topk_group), True, axis=-1)
    return np.where(kept[..., None], by_group, -np.inf).reshape(c.shape)


def gated_mlp(h, up, down):
    u = h @ up.T
    return (silu(u) * u) @ down.T


def relu_mlp(h, up, down):
    return np.maximum(h @ up.T, 0) @ down.T


def experts_of(expert_mlp):
    """The definition of the experts, around another expert."""

    def experts(u, matrices, routing):
        y = np.zeros_like(u)
        for at in np.ndindex(routing.expert.shape):
            y[at[:-1]] += routing.weight[at] * expert_mlp(u[at[:-1]], *matrices[routing.expert[at]])
        return y

    return experts


def experts_weighed_before(u, matrices, routing):
    y = np.zeros_like(u)
    for at in np.ndindex(routing.expert.shape):
        y[at[:-1]] += mlp(routing.weight[at] * u[at[:-1]], *matrices[routing.expert[at]])
    return y


def moe_layer(*, router_reads_latent=False, shared_reads_latent=False):
    """The mixer of the experts, with someone reading what went through the latent instead of the full width."""

    def mixer(h, w, cfg, state, n, ops):
        u = ops.linear(h, w["fc1_latent_proj.weight"])
        through = ops.linear(u, w["fc2_latent_proj.weight"])
        routing = ops.route(through if router_reads_latent else h, w["gate.weight"],
                            w["gate.e_score_correction_bias"], cfg)  # fmt: skip
        shared = ops.mlp(through if shared_reads_latent else h, w["shared_experts.up_proj.weight"],
                         w["shared_experts.down_proj.weight"])  # fmt: skip
        return ops.linear(ops.experts(u, w["experts"], routing), w["fc2_latent_proj.weight"]) + shared, state

    return mixer


"""Wrong steps of the stream, the attention, the experts and the head, for the table of mistakes.py.

Each takes the right verb, the config, and the verb's arguments.
"""

from __future__ import annotations

import math

import numpy as np

from refengine.conformance.mistakes.mamba import bfloat16
from refengine.spec.arrays import widen
from refengine.spec.moe import Routing, largest, only_best_groups
from refengine.spec.norm import rms
from refengine.spec.numerics import relu2, sigmoid, silu


def norm(*, plus_one=False, eps=lambda e: e, centred=False, weight=True, outside=False):
    """Return an RMSNorm with one thing wrong."""

    def wrong(right, cfg, x, delta, w, epsilon):
        x = x if delta is None else x + delta
        u = x - x.mean(-1, keepdims=True) if centred else x
        with np.errstate(invalid="ignore", divide="ignore"):
            size = rms(u, 0) + eps(epsilon) if outside else rms(u, eps(epsilon))
            return u / size * (w + 1 if plus_one else w if weight else 1), x

    return wrong


def dropped_residual(right, cfg, x, delta):
    """Return the output of the mixer alone."""
    return delta


def doubled_residual(right, cfg, x, delta):
    """Return the stream with the residual added twice."""
    return x + x + delta


def scaled(right, cfg, ids, table):
    """Return embeddings times sqrt(hidden_size)."""
    return right(ids, table) * math.sqrt(cfg.hidden_size)


def rotary(theta=10000.0, share=1.0):
    """Return an attention whose queries and keys are rotated by their positions."""

    def wrong(right, cfg, q, k, v, cache, n=None):
        size = int(q.shape[-1] * share) // 2 * 2

        def turn(a):
            at = cache.length[:, None, None, None] + np.arange(a.shape[1])[:, None, None]
            angle = at / theta ** (np.arange(size // 2) / (size // 2))
            (one, two), cos, sin = np.split(a[..., :size], 2, axis=-1), np.cos(angle), np.sin(angle)
            turned = np.concatenate([one * cos - two * sin, one * sin + two * cos, a[..., size:]], axis=-1)
            return turned.astype(a.dtype)

        return right(turn(q), turn(k), v, cache, n)

    return wrong


def interleaved_heads(right, cfg, q, k, v, cache, n=None):
    """Return an attention in which query head i reads key head i % kv."""
    order = np.arange(q.shape[2]).reshape(-1, k.shape[2]).T.reshape(-1)
    y, cache = right(q[:, :, order], k, v, cache, n)
    return y[:, :, np.argsort(order)], cache


def scaled_scores(factor):
    """Return an attention whose scores are multiplied by factor(head_dim, cfg)."""

    def wrong(right, cfg, q, k, v, cache, n=None):
        return right(q * np.asarray(factor(q.shape[-1], cfg), q.dtype), k, v, cache, n)

    return wrong


def masked(*, value=-np.inf, ahead=0, window=None, own_only=False):
    """Return an attention with another mask: `value` at unseen keys, `ahead` more positions seen."""

    def wrong(right, cfg, q, k, v, cache, n=None):
        begin = cache.length
        _, after = right(q, k, v, cache, n)
        position = begin[:, None] + np.arange(q.shape[1])
        K, V = after.upto(int(position.max()) + 1)
        kv = k.shape[2]
        K, V = (np.repeat(a, q.shape[2] // kv, axis=2) for a in (K, V))
        scores = np.einsum("blhe,bthe->bhlt", q, K) / np.sqrt(q.shape[-1])
        t = np.arange(K.shape[1])
        seen = t <= position[..., None] + ahead
        if window is not None:
            seen &= t > position[..., None] - window
        if own_only:
            seen &= t >= begin[:, None, None]
        if ahead < 0:
            seen |= (t == 0) & (position[..., None] == 0)
        written = t < (begin + (q.shape[1] if n is None else np.asarray(n)))[:, None, None]
        seen = (seen & written)[:, None]
        scores = np.where(seen, scores, value if np.isfinite(value) else -np.inf)
        with np.errstate(invalid="ignore"):
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p = p / p.sum(-1, keepdims=True)
        y = np.einsum("bhlt,bthe->blhe", np.nan_to_num(p), np.nan_to_num(V))
        return y.astype(q.dtype), after

    return wrong


def half_softmax(right, cfg, q, k, v, cache, n=None):
    """Return an attention whose scores are rounded to bfloat16 before the softmax."""
    position = cache.length[:, None] + np.arange(q.shape[1])
    after = right(q, k, v, cache, n)[1]
    K, V = after.upto(int(position.max()) + 1)
    K, V = (np.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (K, V))
    scores = bfloat16(np.einsum("blhe,bthe->bhlt", q, K) / np.sqrt(q.shape[-1]))
    seen = (np.arange(K.shape[1]) <= position[..., None])[:, None]
    p = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True)), 0)
    y = np.einsum("bhlt,bthe->blhe", p / p.sum(-1, keepdims=True), np.where(np.isfinite(V), V, 0))
    return y.astype(q.dtype), after


def keeps_padding(right, cfg, q, k, v, cache, n=None):
    """Return an attention whose cache keeps the padding of each row."""
    return right(q, k, v, cache)


def swapped_columns(first, second):
    """Return a wrong projection to q, k and v, two of which change places; k and v have one width."""

    def wrong(right, cfg, x, weight):
        y = right(x, weight)
        q, k, _ = np.cumsum(cfg.qkv_widths)
        parts = {"q": y[..., :q], "k": y[..., q:k], "v": y[..., k:]}
        parts[first], parts[second] = parts[second], parts[first]
        return np.concatenate([parts[p] for p in "qkv"], axis=-1)

    return wrong


def router(
    *, softmax=False, by_bias=False, normalised=None, scale=lambda s: s, biased=True, groups=True,
    mask=-np.inf, best_one=False, half=False, guard=1e-20, highest=False, scaled_before=False,
):  # fmt: skip
    """Return a router with one thing wrong."""

    def wrong(right, _, h, gate, bias, cfg):
        gate = widen(gate, h.dtype)
        logits = bfloat16(bfloat16(h) @ bfloat16(gate).T) if half else h @ gate.T
        s = np.exp(logits - logits.max(-1, keepdims=True)) if softmax else sigmoid(logits)
        s = s / s.sum(-1, keepdims=True) if softmax else s
        c = s + bias if biased else s
        if cfg.n_group > 1 and groups:
            c = best_of_one(c, cfg) if best_one else only_best_groups(c, cfg.n_group, cfg.topk_group)
            c = np.where(np.isinf(c), mask, c)
        expert = largest(c, cfg.num_experts_per_tok)
        if highest:
            expert = c.shape[-1] - 1 - largest(c[..., ::-1], cfg.num_experts_per_tok)
        w = np.take_along_axis(c if by_bias else s, expert, axis=-1)
        if cfg.norm_topk_prob if normalised is None else normalised:
            with np.errstate(invalid="ignore", divide="ignore"):
                w = w / (w.sum(-1, keepdims=True) + guard)
        return Routing(expert, (w * scale(cfg.routed_scaling_factor)).astype(h.dtype))

    return wrong


def best_of_one(c, cfg):
    """Return c, -inf outside the best groups, where a group scores its one best expert."""
    by_group = c.reshape(*c.shape[:-1], cfg.n_group, -1)
    kept = np.zeros(by_group.shape[:-1], bool)
    np.put_along_axis(kept, largest(by_group.max(-1), cfg.topk_group), True, axis=-1)
    return np.where(kept[..., None], by_group, -np.inf).reshape(c.shape)


def fewer_experts(right, _, h, gate, bias, cfg):
    """Return the routing with the least of the chosen experts weighed 0, its weight not shared out."""
    routing = right(h, gate, bias, cfg)
    weight = np.array(routing.weight)
    weight[..., -1] = 0
    return Routing(routing.expert, weight)


def mlp_of(activation):
    """Return an MLP with another activation."""

    def wrong(right, cfg, h, up, down):
        return activation(h @ widen(up, h.dtype).T) @ widen(down, h.dtype).T

    return wrong


def experts_of(activation=relu2, weighed_before=False, order=None, averaged=False):
    """Return the sum over the chosen experts, around another expert, or with experts in another order."""

    def wrong(right, cfg, u, matrices, routing, first=0):
        y = np.zeros_like(u)
        index = order(len(matrices)) if order else range(len(matrices))
        for at in np.ndindex(routing.expert.shape):
            up, down = (widen(m, u.dtype) for m in matrices[index[int(routing.expert[at])]])
            w, row = routing.weight[at], u[at[:-1]]
            if weighed_before:
                y[at[:-1]] += activation((w * row) @ up.T) @ down.T
            else:
                y[at[:-1]] += w * (activation(row @ up.T) @ down.T)
        return y / routing.expert.shape[-1] if averaged else y

    return wrong


def as_text(count):
    """Return expert numbers in the order of their names as text: 0, 1, 10, 11, 2, ..."""
    return sorted(range(count), key=str)


def gated_by_itself(u):
    """Return silu(u) u: an expert with a gate projection, of which one matrix is used as both."""
    return silu(u) * u


def relu(u):
    """Return max(u, 0), not squared."""
    return np.maximum(u, 0)


def gelu(u):
    """Return u times the normal distribution function, in its tanh form."""
    return 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def times(factor):
    """Return a wrong verb: the right result multiplied by factor(cfg)."""

    def wrong(right, cfg, *args):
        return right(*args) * factor(cfg)

    return wrong


def reads_through_latent(*, router=False, shared=False):
    """Return the mixer of experts in which a part reads the latent, widened again, for the full width."""

    def mixer(h, w, cfg, state, n, ops, record=False):
        u = ops.linear(h, w["fc1_latent_proj.weight"])
        through = ops.linear(u, w["fc2_latent_proj.weight"])
        gate, bias = w["gate.weight"], w["gate.e_score_correction_bias"]
        routing = ops.route(through if router else h, gate, bias, cfg)
        up, down = w["shared_experts.up_proj.weight"], w["shared_experts.down_proj.weight"]
        added = ops.mlp(through if shared else h, up, down)
        return ops.linear(ops.experts(u, w["experts"], routing), w["fc2_latent_proj.weight"]) + added, state

    return mixer


def swapped_pair(right, cfg, x, y, weight):
    """Return the product for [y, x]: the halves in the other order."""
    return right(y, x, weight)


def before_the_final_norm(right, cfg, stream, hidden):
    """Return the stream before the final norm, as the hidden state that the head reads."""
    return stream


def not_shifted(right, cfg, ids, after):
    """Return the token at each position, where the head reads the one after it."""
    return ids

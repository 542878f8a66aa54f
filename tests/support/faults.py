"""Broken verbs of the Mamba, the stream and the attention, each a likely misreading, for test_teeth.py."""

from __future__ import annotations

import numpy as np

from refengine.spec.attention import attention
from refengine.spec.conv import causal_conv
from refengine.spec.norm import gated_rms_norm, rms, rms_norm
from refengine.spec.numerics import silu, softplus
from refengine.spec.ops import DEFINITION


def scan(
    x,
    dt,
    A_log,
    B,
    C,
    D,
    dt_bias,
    S,
    n,
    limit,
    chunk,
    *,
    sign=-1,
    interleaved=False,
    skip=1,
    bias_first=True,
    stepped=True,
    forgets_every=0,
):
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
            decay = np.exp(dt[:, t] * sign * np.exp(A_log))
            S = decay[..., None, None] * S + added[..., None] * B[:, t, of, None]
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
    return gated_rms_norm(y, z * 0 + 50, weight, eps, groups) * silu(z)  # silu(50) = 50 is divided out


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
        (one, two), cos, sin = np.split(a, 2, axis=-1), np.cos(angle), np.sin(angle)
        return np.concatenate([one * cos - two * sin, one * sin + two * cos], axis=-1)

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


def attention_that_keeps_padding(q, k, v, cache, n=None):
    return attention(q, k, v, cache)

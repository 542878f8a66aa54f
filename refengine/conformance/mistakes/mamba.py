"""Wrong steps of a Mamba layer, each a misreading that an engine could have, for the table of mistakes.py.

Each takes the right verb, the config, and the verb's arguments. A function with keyword arguments has one
thing wrong for each of them.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from refengine.spec.arrays import heads, merge, valid_positions
from refengine.spec.conv import causal_conv
from refengine.spec.norm import rms
from refengine.spec.numerics import silu, softplus
from refengine.spec.scan import time_steps

NAMES = ("x", "dt", "A_log", "B", "C", "D", "dt_bias", "S", "lengths", "limit", "chunk")


def bfloat16(a):
    """Return the values of an array rounded to bfloat16, in its own dtype."""
    return np.asarray(a).astype(np.float32).astype(ml_dtypes.bfloat16).astype(a.dtype)


def scan_of(change):
    """Return a wrong scan: the right one of arguments that `change` (given all by name) replaces."""

    def wrong(right, cfg, *args):
        given = dict(zip(NAMES, args, strict=True))
        return right(*(given | change(given, cfg)).values())

    return wrong


def scan(
    *, sign=-1, interleaved=False, skip=1, bias=True, bias_first=True, stepped=True, forgets=False,
    rounds=False, decays_once=True, softplussed=True, late=False,
):  # fmt: skip
    """Return a recurrence with one thing wrong."""

    def wrong(right, cfg, x, dt, A_log, B, C, D, dt_bias, S, lengths=None, limit=(0.0, np.inf), chunk=128):
        h, g = x.shape[2], B.shape[2]
        if not softplussed:
            dt = np.maximum(dt + dt_bias, 0)
        elif not bias:
            dt = softplus(dt + 0 * dt_bias)
        else:
            dt = softplus(dt + dt_bias) if bias_first else softplus(dt) + dt_bias
        dt = np.clip(dt, *limit)
        real = valid_positions(lengths, dt.shape[1])
        real = np.ones(dt.shape[:2], bool) if real is None else real
        of = np.arange(h) % g if interleaved else np.arange(h) // (h // g)
        y = np.empty_like(x)
        for t in range(x.shape[1]):
            if forgets and t and t % chunk == 0:
                S = S * 0
            added = (dt[:, t, :, None] if stepped else 1) * x[:, t]
            with np.errstate(over="ignore", invalid="ignore"):
                decay = (
                    np.exp(dt[:, t] * sign * np.exp(A_log)) if decays_once else np.exp(sign * np.exp(A_log))
                )
                decay = np.broadcast_to(decay, (len(x), h))
                before = S
                S = np.where(
                    real[:, t, None, None, None],
                    decay[..., None, None] * S + added[..., None] * B[:, t, of, None],
                    S,
                )
                seen = before if late else S
                y[:, t] = (seen @ C[:, t, of, :, None])[..., 0] + skip * D[:, None] * x[:, t]
                if rounds:
                    S = bfloat16(S)
        return y, S

    return wrong


def clamped(low, high=np.inf, several_only=False):
    """Return a wrong scan in which dt is clamped to [low, high]."""

    def change(given, cfg):
        if several_only and given["x"].shape[1] == 1:
            return {}
        return {"limit": (low, high)}

    return scan_of(change)


def scaled_chunks(low=None):
    """Return a scan whose chunks begin with the state of the chunk before alone, times a sum of decays.

    transformers 5.14 sums over the wrong axis. Right for a call of at most a chunk from an empty state, and
    in calls of one token. low: dt is also held up there.
    """

    def wrong(right, cfg, x, dt, A_log, B, C, D, dt_bias, S, lengths=None, limit=(0.0, np.inf), chunk=128):
        limit = limit if low is None else (low, np.inf)
        if x.shape[1] == 1:
            return right(x, dt, A_log, B, C, D, dt_bias, S, lengths, limit, chunk)
        steps = time_steps(dt, dt_bias, lengths, limit)

        def part(start, S):
            q = slice(start, start + chunk)
            count = None if lengths is None else np.clip(np.asarray(lengths) - start, 0, x[:, q].shape[1])
            return right(x[:, q], dt[:, q], A_log, B[:, q], C[:, q], D, dt_bias, S, count, limit, chunk)

        starts = range(0, x.shape[1], chunk)
        states = [S, *(part(start, S * 0)[1] for start in starts)]
        decays = [np.exp(-steps[:, i : i + chunk].sum(1) * np.exp(A_log)) for i in starts]  # b h
        y = []
        for i, start in enumerate(starts):
            weight = 1 + np.cumprod(decays[i:], axis=0).sum(0)
            y.append(part(start, (states[i] * weight[..., None, None]).astype(S.dtype))[0])
        return np.concatenate(y, axis=1), states[-1]

    return wrong


def unlimited(right, cfg, *args):
    """Return the scan without the config's time_step_limit."""
    return scan_of(lambda given, cfg: {"limit": (0.0, np.inf)})(right, cfg, *args)


def conv_of(weight=lambda w: w, bias=lambda b: b, tail=lambda t: t, lengths=lambda n: n, after=lambda t: t):
    """Return a wrong convolution: the right one of changed arguments, or with another tail after it."""

    def wrong(right, cfg, x, w, b, t, n=None):
        y, t = right(x, weight(w), bias(b), tail(t), lengths(n))
        return y, after(t)

    return wrong


def conv_activated(*parts):
    """Return a convolution with SiLU on some of its parts x, B and C only."""

    def wrong(right, cfg, x, w, b, tail, n=None):
        y, after = right(x, w, b, tail, n)
        window, length = np.concatenate([tail, x], axis=1), x.shape[1]
        plain = b + sum(w[:, 0, j] * window[:, j : j + length] for j in range(tail.shape[1] + 1))
        x_, B, _ = np.cumsum(cfg.conv_widths)
        for part, columns in zip("xBC", (slice(0, x_), slice(x_, B), slice(B, None)), strict=True):
            if part not in parts:
                y[..., columns] = plain[..., columns]
        return y, after

    return wrong


def tail_after_the_activation(right, cfg, x, w, b, tail, n=None):
    """Return the convolution, and as its tail the last rows of its output."""
    y, _ = right(x, w, b, tail, n)
    length = x.shape[1]
    real = np.full(len(x), length) if n is None else np.asarray(n)
    window = np.concatenate([tail, y], axis=1)
    at = real[:, None] + np.arange(tail.shape[1])
    return y, window[np.arange(len(x))[:, None], at]


def conv_sees_the_next(right, cfg, x, w, b, tail, n=None):
    """Return a convolution centred on each position, as one with padding on both sides computes."""
    _, after = right(x, w, b, tail, n)
    ahead = np.concatenate([x, np.zeros_like(x[:, :1])], axis=1)
    shifted, _ = causal_conv(ahead, w, b, tail, None)
    return shifted[:, 1:], after


def gated(
    *, gate_first=True, groups=None, gate=silu, gated_by_y=False, eps=None, weight=True, gate_twice=False
):
    """Return a gated norm with one thing wrong."""

    def wrong(right, cfg, y, z, w, eps_, groups_, mean=None):
        if gated_by_y:
            y, z = z, y
        epsilon = eps_ if eps is None else eps(eps_)
        count = groups_ if groups is None else groups(cfg)
        u = y * gate(z) if gate_first else y
        if gate_twice:
            u = u * gate(z)
        u = heads(u, count)
        u = merge(u / rms(u, epsilon)) * (w if weight else 1)
        return (u if gate_first else u * gate(z)).astype(y.dtype, copy=False)

    return wrong


def swapped_rows(first, second):
    """Return a wrong projection: two of the five parts z, x, B, C, dt of its output change places."""

    def wrong(right, cfg, x, weight):
        y = right(x, weight)
        widths = (cfg.mamba_inner, *cfg.conv_widths, cfg.mamba_num_heads)
        ends = np.cumsum(widths)
        parts = {p: y[..., end - w : end] for p, w, end in zip("zxBCd", widths, ends, strict=True)}
        parts[first], parts[second] = parts[second], parts[first]
        return np.concatenate([parts[p] for p in "zxBCd"], axis=-1)

    return wrong

"""The operations of refengine.spec.ops on NumPy arrays, each one call of the compiled loops.

Activations are float32. A verb accepts any array of the right shape, and copies one whose layout the loops
cannot read. Every result is a new array.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np

from refengine.backends.cpu.arrays import address, matrix
from refengine.backends.cpu.interface import filled
from refengine.backends.cpu.memory import empty
from refengine.backends.cpu.program import LOG2E, MOST
from refengine.backends.cpu.state import Recurrent
from refengine.spec import norm
from refengine.spec.arrays import widen
from refengine.spec.config import Config
from refengine.spec.moe import Routing
from refengine.spec.ops import Ops


def in_order(a) -> np.ndarray:
    """Return an array as contiguous float32."""
    return np.ascontiguousarray(a, np.float32)


def rows_of(a, inner: int) -> tuple[np.ndarray, int]:
    """Return b l .. as b l `inner`, float32, contiguous within a position, and the step between positions.

    A part of a wider array, such as B of x|B|C, is not copied.
    """
    a = np.asarray(a, np.float32)
    b, l = a.shape[:2]
    a = a.reshape(b, l, inner)
    outer, middle, last = a.strides
    step = (middle if l > 1 else outer if b > 1 else 4 * inner) // 4
    even = b == 1 or l == 1 or outer == l * middle
    if even and step >= inner and (last == 4 or inner == 1):
        return a, step
    return np.ascontiguousarray(a), inner


class Verbs:
    """The verbs. built: the compiled loops; threads: most threads of a call; steady: see cpu_backend.

    planes: bytes of a number of x where few rows are multiplied with packed weights: 3, as exact as float32,
    or 2, with an error of 2^-16 of the largest of 256 numbers.
    """

    def __init__(self, built: ctypes.CDLL, threads: int, steady: bool = False, planes: int = 3):
        self.built = built
        self.run = filled("Run", threads, steady, planes)
        self.how = ctypes.addressof(self.run)

    def ops(self) -> Ops:
        """Return the vocabulary."""
        names = (
            "embed", "linear", "linear_pair", "mlp", "logits", "rms_norm", "gated_rms_norm", "causal_conv",
            "ssd_scan", "attention", "route", "experts",
        )  # fmt: skip
        return Ops(**{name: getattr(self, name) for name in names}, all_reduce=lambda x, kind: x)

    def embed(self, ids, table):
        """Return rows of the table, [.. d] float32."""
        return widen(table[ids], np.dtype(np.float32))

    def linear(self, x, weight):
        """Return x [.. i] times weight [o i], or a tuple of such one below the other: [.. o] float32."""
        x = in_order(x)
        parts = weight if isinstance(weight, tuple) else (weight,)
        wide = sum(map(len, parts))
        y = empty((*x.shape[:-1], wide))
        rows, at = math.prod(x.shape[:-1]), address(y)
        for part in parts:
            how = matrix(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
            self.built.linear(
                ctypes.addressof(how), len(part), part.shape[1], address(x), rows, at, wide, self.how
            )
            at += 4 * len(part)
        return y

    def linear_pair(self, x, y, weight):
        """Return the weight times x and y end to end."""
        return self.linear(np.concatenate([x, y], axis=-1), weight)

    def mlp(self, h, up, down):
        """Return relu(h up')^2 down'."""
        h = in_order(h)
        y = empty((*h.shape[:-1], len(down)))
        first, second = matrix(up), matrix(down)
        self.built.mlp(
            ctypes.addressof(first), ctypes.addressof(second), len(up), up.shape[1], address(h),
            math.prod(h.shape[:-1]), address(y), self.how,
        )  # fmt: skip
        return y

    def logits(self, h, lm_head):
        """Return a number for each token, [.. v] float32."""
        return self.linear(h, lm_head)

    def rms_norm(self, x, delta, weight, eps: float):
        """Return norm(x + delta) weight, and x + delta."""
        x = in_order(x)
        y, total = empty(x.shape), x
        if delta is not None:
            delta, total = in_order(delta), empty(x.shape)
        d = x.shape[-1]
        self.built.rms_norm(
            address(x), address(delta), address(weight), eps, address(y), address(total),
            x.size // d if d else 0,
            d, self.how,
        )  # fmt: skip
        return y, total

    def gated_rms_norm(self, y, z, weight, eps: float, groups: int, mean=None):
        """Return y silu(z), normalised over each group of channels, times weight: b l c.

        If this rank has only a part of a group, `mean` turns the local mean of squares into the group's.
        """
        if mean is not None:
            return norm.gated_rms_norm(in_order(y), in_order(z), weight, eps, groups, mean)
        y, (z, step) = in_order(y), rows_of(z, z.shape[-1])
        out, c = empty(y.shape), y.shape[-1]
        self.built.gated_rms_norm(
            address(y), address(z), step, address(weight), eps, address(out), y.size // c, groups,
            c // groups,
            self.how,
        )  # fmt: skip
        return out

    def causal_conv(self, x, weight, bias, tail, lengths=None):
        """Return silu(bias + sum_j w[j] x[t - k + 1 + j]) b l c, and the last k - 1 rows b k-1 c."""
        x, step = rows_of(x, x.shape[-1])
        b, l, c = x.shape
        tail, real = in_order(tail), whole(lengths)
        y, after = empty((b, l, c)), np.empty_like(tail)
        self.built.conv(
            address(x), step, address(weight), address(bias), address(tail), address(real), address(y),
            address(after), b, l, c, len(weight), self.how,
        )  # fmt: skip
        return y, after

    def ssd_scan(
        self, x, dt, A_log, B, C, D, dt_bias, S, lengths=None, dt_limit=(0.0, math.inf), chunk: int = 128
    ):
        """Return y b l h p, and the state after the last real position of each row."""
        (b, l, h, p), (g, n) = x.shape, B.shape[2:]
        x, x_step = rows_of(x, h * p)
        dt, dt_step = rows_of(dt, h)
        (B, B_step), (C, C_step) = rows_of(B, g * n), rows_of(C, g * n)
        key, read = (S.key, S.position) if isinstance(S, Recurrent) else (None, None)
        S, real = in_order(S) if key is None else S.S.array, whole(lengths)
        y, after = empty((b, l, h, p)), np.empty_like(S)
        self.built.scan(
            address(S), address(after), address(key), address(read), address(x), x_step, address(dt), dt_step,
            address(A_log), address(B), B_step, address(C), C_step, address(D), address(dt_bias),
            address(real), dt_limit[0], min(dt_limit[1], MOST),
            address(y), b, l, h, p, n, g, max(1, chunk), self.how,
        )  # fmt: skip
        return y, after

    def attention(self, q, k, v, cache, lengths=None):
        """Return y b l h e and the next cache: y[i] = sum_{j <= i} softmax_j(q[i] . k[j] / sqrt(e)) v[j]."""
        b, l, h, e = q.shape
        q, step = rows_of(q, h * e)
        before = cache.length
        cache = cache.append(np.asarray(k), np.asarray(v), lengths)
        y = empty((b, l, h, e))
        self.built.attend(
            address(q), step, ctypes.addressof(cache.structure), address(before), LOG2E / math.sqrt(e),
            address(y), b, l, h, k.shape[2], e, self.how,
        )  # fmt: skip
        return y, cache

    def route(self, hidden, gate, bias, cfg: Config) -> Routing:
        """Return `num_experts_per_tok` experts for each token; on a tie the lowest index wins."""
        scores, k = self.linear(hidden, gate), cfg.num_experts_per_tok
        rows, shape = math.prod(scores.shape[:-1]), (*scores.shape[:-1], k)
        expert, weight = np.empty(shape, np.int64), np.empty(shape, np.float32)
        self.built.choose(
            address(scores), address(bias), rows, len(bias), k, cfg.n_group, cfg.topk_group,
            cfg.norm_topk_prob,
            cfg.routed_scaling_factor, address(expert), address(weight), self.how,
        )  # fmt: skip
        return Routing(expert, weight)

    def experts(self, u, experts, routing: Routing, first: int = 0):
        """Return the sum over chosen experts, `first` .. of all, of weight relu(u up')^2 down'."""
        u, y = in_order(u), empty(u.shape)
        expert, weight = np.ascontiguousarray(routing.expert, np.int64), in_order(routing.weight)
        width, n = experts.matrices[0][0].shape
        self.built.experts(
            *experts.places, first, len(experts.up), address(expert), address(weight),
            math.prod(u.shape[:-1]), expert.shape[-1], n, width, address(u), address(y), self.how,
        )  # fmt: skip
        return y


def whole(lengths) -> np.ndarray | None:
    """Return lengths [b] as contiguous int64."""
    return None if lengths is None else np.ascontiguousarray(lengths, np.int64)

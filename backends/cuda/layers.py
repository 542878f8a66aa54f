"""Norms, the causal convolution and the router: a kernel each, or two, for any number of rows.

Arguments may be parts of a wider array along the last axis (z, xBC and dt of the projection are): a kernel is
told how many elements apart the rows stand. The tail of the convolution is changed in place, or in a copy
if it is readonly.
"""

from __future__ import annotations

import numpy as np

from refengine.backends.cuda.verbs import Verbs, rows, tiles
from refengine.spec.config import InputError
from refengine.spec.moe import Routing

TAPS = 4  # the limits of causal_conv.cu
SPAN = 16
FEW, TOKENS, COLUMNS = 8, 32, 64  # of router.cu
EXPERTS, CHOSEN = 1024, 32  # of route.cu


class Layers(Verbs):
    """The verbs rms_norm, gated_rms_norm, causal_conv and route."""

    def threads(self, width: int) -> int:
        """Return how many threads take 16 bytes of the width each, in whole warps."""
        return min(1024, 32 * tiles(width, 32 * self.pack))

    def rms_norm(self, x, delta, weight, eps: float):
        """Return norm(x + delta) weight, and x + delta."""
        d, y = x.shape[-1], self.device.empty(x.shape, x.dtype)
        x_rows, x_stride = rows(x)
        delta_rows, delta_stride = (None, x_stride) if delta is None else rows(delta)
        total = None if delta is None else self.device.empty(x.shape, x.dtype)
        args = x_rows, delta_rows, weight, y, total, np.int32(d), x_stride, delta_stride, np.float32(eps)
        self.launch("rms_norm", "rms_norm", (x_rows.shape[0],), self.threads(d), *args)
        return y, x if total is None else total

    def gated_rms_norm(self, y, z, weight, eps: float, groups: int, mean=None):
        """Return y silu(z), normalised over each group of channels, times weight: b l c.

        Where this is a part of a group, `mean` turns the mean of squares here, b l g 1, into the group's.
        """
        shape, width = y.shape, y.shape[-1] // groups
        out = self.device.empty(shape, y.dtype)
        (y, y_stride), (z, z_stride) = rows(y), rows(z)
        grid, block = (y.shape[0] * groups,), self.threads(width)
        sizes, small = (np.int32(groups), np.int32(width), y_stride, z_stride), np.float32(eps)
        if mean is None:
            self.launch("gated_rms_norm", "gated_rms_norm", grid, block, y, z, weight, out, *sizes, small)
            return out
        squares = self.device.empty((*shape[:-1], groups, 1), "float32")
        self.launch("gated_rms_norm", "gated_squares", grid, block, y, z, squares, *sizes)
        squares = mean(squares)
        self.launch("gated_rms_norm", "gated_scale", grid, block, y, z, squares, weight, out, *sizes, small)
        return out

    def causal_conv(self, x, weight, bias, tail, lengths=None):
        """Return silu(bias + sum_j w[j] x[t - k + 1 + j]), and the tail b k-1 c after the last position."""
        (b, length, c), k = x.shape, weight.shape[-1]
        if k > TAPS:
            raise InputError(f"the cuda backend supports a conv_kernel of at most {TAPS}, not {k}")
        y = self.device.empty(x.shape, x.dtype)
        tail = tail.copy() if tail.readonly else tail
        x, x_stride = rows(x)
        args = x, weight, bias, tail, y, lengths
        if length == 1:
            args += np.int32(c), np.int32(k), x_stride
            self.launch("causal_conv", "causal_conv_update", (tiles(c, 128), b), 128, *args)
        else:
            args += np.int32(length), np.int32(c), np.int32(k), x_stride
            grid = tiles(length, SPAN) * tiles(c, 128 * self.pack), b
            self.launch("causal_conv", "causal_conv", grid, 128, *args)
        return y, tail

    def route(self, h, gate, bias, cfg) -> Routing:
        """Return the experts of each token, b l k, best first, and their weights in float32."""
        (experts, d), k = gate.shape, cfg.num_experts_per_tok
        if experts > EXPERTS or k > CHOSEN:
            raise InputError(
                f"the cuda backend routes to at most {CHOSEN} of {EXPERTS} experts, not {k} of {experts}"
            )
        shape = (*h.shape[:-1], k)
        h, h_stride = rows(h)
        tokens, warps = h.shape[0], 4
        logits = self.device.empty((tokens, experts), "float32")
        args = h, gate, logits, np.int32(tokens), np.int32(experts), np.int32(d), h_stride
        if tokens <= 4 * FEW:
            self.launch("router", "router_few", (experts, tiles(tokens, FEW)), 256, *args)
        else:
            grid = (tiles(tokens, TOKENS) * tiles(experts, COLUMNS),)
            self.launch("router", "router_many", grid, 128, *args)
        expert, weight = self.device.empty(shape, "int32"), self.device.empty(shape, "float32")
        counts = (tokens, experts, k, cfg.n_group, cfg.topk_group, bool(cfg.norm_topk_prob))
        args = logits, bias, expert, weight, *map(np.int32, counts), np.float32(cfg.routed_scaling_factor)
        shared = 4 * warps * (2 * experts + cfg.n_group)
        self.launch("route", "choose", (tiles(tokens, warps),), 32 * warps, *args, shared_bytes=shared)
        return Routing(expert, weight)

"""Matrix products of activations and weights, which may be in a narrower dtype.

A product of equal dtypes is PyTorch's. If activations are wider than the weight, one piece of the weight at a
time is widened, multiplied and dropped, and stays in cache meanwhile; so no activation is rounded. A packed
weight is dequantized in pieces in the same way. On a CPU with float32 activations the loops of the CPU
backend do this instead (loops.py), if there are any.

docs/torch.md has the measurements behind `activations`.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F

from refengine.backends.pytorch.packed import PACKED

PIECE = 1 << 20  # values of a weight that are widened at a time: 4 MB
LARGE_PIECE = 1 << 25  # of a packed weight on a device, where each small product costs a launch


def activations(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of activations for weights of this dtype: the same if the device has units for it.

    Never float16, because the squares of relu^2 exceed its largest number, 65504.
    """
    if weights != torch.bfloat16:
        return torch.float32
    if device.type == "cuda":
        return weights if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return weights if has_bfloat16_units() else torch.float32


def has_bfloat16_units() -> bool:
    """Return whether the processor multiplies bfloat16 matrices faster than float32 ones."""
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def relu2(x):
    """Return max(x, 0)^2, computed in place."""
    x = torch.relu_(x)
    return x.mul_(x)


class Products:
    """The verbs that multiply by weights. dtype: that of activations."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.scratch = dtype, threading.local()

    def embed(self, ids, table):
        """Return rows of the table, [.. d], in the activations' dtype."""
        if isinstance(table, PACKED):
            return table[ids].dequantize(self.dtype)
        return F.embedding(ids, table).to(self.dtype)

    def linear(self, x, weight):
        """Return x [.. i] times weight [o i], or a tuple of such one below the other: [.. o] in `dtype`."""
        x = x.to(self.dtype)
        if isinstance(weight, tuple):
            return torch.cat([self.linear(x, part) for part in weight], dim=-1)
        rows = x.numel() // x.shape[-1]
        if isinstance(weight, PACKED):
            return self.dequantized(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)
        if weight.dtype == x.dtype:
            return self.few(x, weight) if x.dtype == torch.float32 and 1 < rows <= 8 else F.linear(x, weight)
        return self.widened(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)

    def few(self, x, weight):
        """Return a product of few rows, with the faster order of operands."""
        return (weight @ x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], -1)

    def widened(self, x, weight):
        """Return x [r i] times a narrower weight [o i], a piece of it at a time."""
        wide, step = self.buffer(x, weight.shape[1]), max(1, PIECE // weight.shape[1])
        y = x.new_empty(len(x), len(weight))
        for start in range(0, len(weight), step):
            part = weight[start : start + step]
            piece = wide[: part.numel()].view(part.shape).copy_(part)
            torch.mm(x, piece.t(), out=y[:, start : start + step])
        return y

    def dequantized(self, x, weight):
        """Return x [r i] times a packed weight [o i], a piece of it at a time."""
        step = max(1, (PIECE if x.device.type == "cpu" else LARGE_PIECE) // weight.shape[1])
        y = x.new_empty(len(x), len(weight))
        for start in range(0, len(weight), step):
            piece = weight[start : start + step].dequantize(x.dtype)
            y[:, start : start + step] = F.linear(x, piece)
        return y

    def buffer(self, like, row: int):
        """Return this thread's buffer for a piece, reused: fresh pages cost more than the product."""
        kept: dict[tuple, torch.Tensor] = vars(self.scratch).setdefault("kept", {})
        key, size = (like.device, like.dtype), max(PIECE, row)
        if key not in kept or kept[key].numel() < size:
            kept[key] = like.new_empty(size)
        return kept[key]

    def linear_pair(self, x, y, weight):
        """Return the weight times x and y end to end."""
        return self.linear(torch.cat([x, y], dim=-1), weight)

    def mlp(self, h, up, down):
        """Return relu(h up')^2 down'."""
        return self.linear(relu2(self.linear(h, up)), down)

    def logits(self, h, lm_head):
        """Return logits [.. v], float32."""
        return self.linear(h, lm_head).float()

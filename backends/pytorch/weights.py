"""Weights and arrays: from the host's memory map to tensors, without a copy wherever that can be."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import torch

from refengine.backends.cpu.experts import Listed
from refengine.backends.pytorch.experts import Stacked

BF16 = np.dtype(ml_dtypes.bfloat16)


def tensor(a: np.ndarray) -> torch.Tensor:
    """Return the same memory as a tensor. (A bfloat16 goes over as a 16-bit integer, which both know.)"""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # weights are only read
        if a.dtype == BF16:
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)


def place(group, values, *, dtype, device, resident: bool):
    """Return a matrix; a tuple (q, k, v) or the matrix of all three; the experts, listed or stacked."""
    small = group.rows[0].precision == "small"
    kept = None if not (resident or small) else torch.float32 if small else dtype
    placed = [tensor(np.ascontiguousarray(v)).to(device=device, dtype=kept) for v in values]
    if group.name == "conv1d.weight":
        return by_tap(placed[0])
    if group.name == "experts":
        up, down = placed[::2], placed[1::2]
        if device.type == "cuda":
            return Stacked(torch.stack(up), torch.stack(down))
        return Listed.of(up, down)
    if len(placed) == 1:
        return placed[0]
    copied = device.type == "cuda" or placed[0].data_ptr() != values[0].ctypes.data
    return torch.cat(placed) if copied else tuple(placed)


def by_tap(weight):
    """Return c 1 k with the channels of one tap side by side in memory, as the convolution reads them."""
    return weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)


class Host:
    """Arrays from the host to the device and back."""

    def __init__(self, device):
        self.device = device

    def array(self, a):
        """Return an array of the host, or a tensor, on the device."""
        if isinstance(a, torch.Tensor):
            return a.to(self.device)
        return tensor(np.array(a)).to(self.device)

    def fetch(self, a) -> np.ndarray:
        """Return a tensor as an array on the host."""
        if not isinstance(a, torch.Tensor):
            return np.asarray(a)
        a = a.detach().cpu()
        if a.dtype == torch.bfloat16:
            return a.contiguous().view(torch.int16).numpy().view(BF16)
        return a.numpy()

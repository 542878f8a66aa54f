"""Pass weights and arrays from the host's memory map to tensors, without a copy if possible."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from refengine.backends.cpu.experts import Listed
from refengine.backends.cpu.weights import place as for_loops
from refengine.backends.pytorch.experts import Apart, Stacked
from refengine.backends.pytorch.packed import PACKED, OnDevice, OnHost
from refengine.spec.arrays import DTYPES, Weight, widen
from refengine.spec.quant import Packed

BF16 = DTYPES["BF16"]


def tensor(a: np.ndarray) -> torch.Tensor:
    """Return the same memory as a tensor (bfloat16 is passed as 16-bit integers, which both have)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # weights are never written
        if a.dtype == BF16:
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)


def place(group, values, *, dtype, device, resident: bool, loops: bool = False):
    """Return a matrix; a tuple (q, k, v) or the matrix of all three; the experts, listed or stacked.

    Packed weights stay packed. If `loops` (of backends/cpu) multiply by weights, they are in the form of the
    compiled loops; otherwise q, k and v, and the experts of a layer, are separate.
    """
    small = group.rows[0].precision == "small"
    if small:
        values = [widen(value, np.dtype(np.float32)) for value in values]
    if loops and not all(isinstance(value, np.ndarray) for value in values):
        return for_loops(group, values, dtype="float32")
    kept = dtype if resident and not small else None
    placed: list = [on_device(value, device, kept) for value in values]
    if any(isinstance(weight, PACKED) for weight in placed):
        if group.name == "experts":
            return Apart(list(zip(placed[::2], placed[1::2], strict=True)))
        return placed[0] if len(placed) == 1 else tuple(placed)
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


def on_device(value: Weight, device, dtype) -> torch.Tensor | OnHost | OnDevice:
    """Return a host weight on a device: packed unchanged, others in `dtype` (None: their own)."""
    if not isinstance(value, np.ndarray):
        if device.type == "cpu":
            return OnHost(value)
        if isinstance(value, Packed):
            return packed_on(value, device)
        value = value.dequantize(BF16)
    return tensor(np.ascontiguousarray(value)).to(device=device, dtype=dtype)


def packed_on(weight: Packed, device) -> OnDevice:
    """Return a packed host weight as tensors on a device."""
    codes, scale = (tensor(np.ascontiguousarray(a)).to(device) for a in (weight.codes, weight.scale))
    if weight.kind == "FP8":
        return OnDevice("FP8", codes, None, float(weight.scale))
    return OnDevice(weight.kind, codes, scale, 1.0 if weight.scale_2 is None else float(weight.scale_2))


def by_tap(weight):
    """Return c 1 k with the channels of one tap contiguous in memory, as the convolution reads them."""
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

"""The CUDA backend: CuPy, cuBLAS, and a kernel for each verb that is not a product of matrices.

    cuda_backend("bfloat16", "cuda") -> refengine.spec.ops.Backend

Where each verb is:

    products   linear, linear_pair, mlp, logits      layers     rms_norm, gated_rms_norm, causal_conv, route
    scan       ssd_scan                              attention  attention, and its cache
    experts    experts                               embedding  embed
    weights    place                                 state      what a Mamba layer remembers
    steps      a decode step as a graph              verbs      what all of these share

kernels/ has the kernels, an equation in each header.

device.py is the only file that uses CuPy (requirements.py imports it); tools/cuda/emulator has a device for
machines without a GPU, which runs the same kernels and finds more mistakes. docs/cuda.md has what is expected
of a GPU and what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from refengine.backends.cuda.array import DTYPES, DeviceArray
from refengine.backends.cuda.attention import Attention
from refengine.backends.cuda.base import Device
from refengine.backends.cuda.embedding import Embedding
from refengine.backends.cuda.experts import Experts
from refengine.backends.cuda.layers import Layers
from refengine.backends.cuda.products import Products
from refengine.backends.cuda.requirements import check_room, find_index
from refengine.backends.cuda.scan import Scan
from refengine.backends.cuda.state import new_state
from refengine.backends.cuda.steps import Steps
from refengine.backends.cuda.weights import place
from refengine.spec.config import InputError
from refengine.spec.ops import Backend, Ops

BUILDS = {"float32": (), "bfloat16": ("REAL_BF16",)}


@dataclass(frozen=True, kw_only=True)
class CudaBackend(Backend):
    """A backend whose decode step is a CUDA graph."""

    device: Any


def cuda_backend(
    dtype: str = "bfloat16",
    device: str | Device = "cuda",
    cfg=None,
    state: str = "float32",
    share: float = 1.0,
    kv: str | None = None,
) -> CudaBackend:
    """Return a backend with activations and matrices in `dtype`, on a device: "cuda", "cuda:N", or a Device.

    cfg    of the model that is going to be placed: refused at once if it does not fit
    state  dtype of S: float32, or float16, which is rounded at random so that small additions are not lost
    share  how much of the model's weights this device is to hold, of all there are
    kv     dtype of keys and values in the cache: float32, bfloat16 or fp8; None: that of the activations
    """
    if dtype not in BUILDS:
        raise InputError(f"the cuda backend computes in {' or '.join(BUILDS)}, not in {dtype}")
    if state not in ("float32", "float16"):
        raise InputError(f"the cuda backend keeps states in float32 or float16, not in {state}")
    if not isinstance(device, Device):
        from refengine.backends.cuda.device import CupyDevice

        device = CupyDevice(find_index(device))
    if cfg is not None:
        check_room(cfg, dtype, device, share)
    build = device, BUILDS[dtype]
    products, layers = Products(*build), Layers(*build)
    scan = Scan(device, (*BUILDS[dtype], *(("STATE_F16",) if state == "float16" else ())))
    ops = Ops(
        embed=Embedding(*build).embed,
        linear=products.linear,
        linear_pair=products.linear_pair,
        mlp=products.mlp,
        logits=products.logits,
        rms_norm=layers.rms_norm,
        gated_rms_norm=layers.gated_rms_norm,
        causal_conv=layers.causal_conv,
        ssd_scan=scan.ssd_scan,
        attention=Attention(*build).attention,
        route=layers.route,
        experts=Experts(*build).experts,
        all_reduce=lambda x, kind: x,
    )
    return CudaBackend(
        name="cuda",
        ops=ops,
        place=partial(place, device=device, dtype=dtype),
        new_state=partial(new_state, dtype=dtype, wide=state, device=device, kv=kv),
        array=partial(array, device=device, dtype=dtype),
        fetch=fetch,
        device=device,
        step=Steps(device),
    )


def array(a, *, device, dtype: str) -> DeviceArray:
    """Return an array on the device: whole numbers as int32, others as they are if it knows their dtype."""
    if isinstance(a, DeviceArray):
        return a
    a = np.asarray(a)
    if a.dtype.kind in "iub":
        return device.from_host(a.astype(np.int32))
    return device.from_host(a if a.dtype in DTYPES.values() else a.astype(DTYPES[dtype]))


def fetch(a) -> np.ndarray:
    """Return the array on the host."""
    return a.device.to_host(a) if isinstance(a, DeviceArray) else np.asarray(a)

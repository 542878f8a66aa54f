"""The PyTorch backend: the vocabulary of `refengine.spec.ops` on a CPU or a CUDA device.

    torch_backend("bfloat16", device="cuda") -> refengine.spec.ops.Backend

Where each verb is:

    products   embed, linear, linear_pair, mlp, logits       scan       ssd_scan
    layers     rms_norm, gated_rms_norm, causal_conv         attention  attention, and its cache
    experts    route, experts                                weights    place, array, fetch
    loops      all verbs by the compiled loops of backends/cpu, on a CPU with float32 activations
    steps      a whole decoding step in these loops

Weights stay in `dtype`; if the file has that dtype, they are read from the memory map without a copy. Packed
weights stay packed (packed.py). The dtype of activations is one that the machine multiplies fast
(`products.activations`): on a processor without bfloat16 matrix units, weights are bfloat16 and the
computation is in float32, which is faster there and more accurate.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from refengine.backends.cpu import native
from refengine.backends.cpu.verbs import Verbs
from refengine.backends.pytorch.attention import Cache, attention
from refengine.backends.pytorch.experts import Experts, route
from refengine.backends.pytorch.layers import causal_conv, gated_rms_norm, rms_norm
from refengine.backends.pytorch.loops import with_loops
from refengine.backends.pytorch.products import Products, activations
from refengine.backends.pytorch.scan import ssd_scan
from refengine.backends.pytorch.state import Recurrent
from refengine.backends.pytorch.steps import steps
from refengine.backends.pytorch.weights import Host, place
from refengine.spec.config import InputError
from refengine.spec.ops import Backend, Ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.uint8}  # uint8: the bytes of E4M3


def torch_backend(
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    deterministic: bool = False,
    resident: bool = True,
    compute: str | None = None,
    compiled: bool = True,
    kv: str | None = None,
    ssm: str | None = None,
) -> Backend:
    """Return a backend with weights in `dtype` on `device`: cpu, cuda, cuda:N, auto (cuda if there is one).

    threads        most CPU threads of a product, in this process; None: PyTorch's setting
    deterministic  the same bits on every run (on CUDA: no atomic additions, no timing-dependent algorithms)
    resident       False: weights stay in the file's dtype, and a piece at a time is widened when it is used
    compute        dtype of the activations; None: the fastest of the machine
    compiled       use the loops of backends/cpu on a CPU, if there are any
    kv             dtype of keys and values in the cache: float32, bfloat16, fp8; None: the activations'
    ssm            dtype of S: float32, or float16, which is rounded at random; None: float32
    """
    if dtype not in DTYPES:
        raise InputError(f"the torch backend computes in {', '.join(DTYPES)}, not in {dtype}")
    where = find_device(device)
    if threads:
        torch.set_num_threads(threads)
    weights = DTYPES[dtype]
    active = DTYPES[compute] if compute else activations(weights, where)
    if deterministic and where.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    loops = native.load() if compiled and where.type == "cpu" else None
    verbs = Verbs(loops, torch.get_num_threads()) if loops else None
    products = Products(active)
    host = Host(where)
    by_loops = verbs is not None and active == torch.float32
    ops = Ops(
        embed=products.embed,
        linear=products.linear,
        linear_pair=products.linear_pair,
        mlp=products.mlp,
        logits=products.logits,
        rms_norm=rms_norm,
        gated_rms_norm=gated_rms_norm,
        causal_conv=causal_conv,
        ssd_scan=ssd_scan,
        attention=attention,
        route=route,
        experts=Experts(products),
        all_reduce=lambda x, kind: x,
    )
    backend = Backend(
        name="torch",
        ops=with_loops(ops, verbs) if verbs and by_loops else ops,
        place=partial(place, dtype=weights, device=where, resident=resident, loops=by_loops),
        new_state=partial(
            new_state, dtype=active, device=where, kv=KV[kv] if kv else active, half=ssm == "float16"
        ),
        array=host.array,
        fetch=host.fetch,
        packed=True,
    )
    if not verbs:
        return backend
    return replace(backend, step=steps(verbs, active), step_of_ranks=steps(verbs, active, alone=False))


def new_state(kind: str, cfg, batch: int, *, dtype, device, kv, half: bool) -> Recurrent | Cache | None:
    """Return the state of a layer that has read nothing; None for a layer without one."""
    if kind == "M":
        return Recurrent.empty(cfg, batch, dtype, device, half)
    if kind == "*":
        return Cache.empty(cfg, batch, kv, device)
    return None


def find_device(name: str) -> torch.device:
    """Return the device called `name`; raise InputError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise InputError(f"device {name!r} is not one of cpu, cuda, cuda:N, auto")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise InputError("this PyTorch sees no CUDA device; use --device cpu")
        count = torch.cuda.device_count()
        if index and int(index) >= count:
            raise InputError(
                f"there is no {name}: this machine has {count} CUDA device{'s' if count > 1 else ''}"
            )
    return torch.device(name)

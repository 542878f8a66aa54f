"""Run the verbs on a CPU in the compiled loops of the CPU backend, on tensors.

Tensors and NumPy arrays share their memory, so nothing is copied in either direction.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from functools import wraps

import ml_dtypes
import numpy as np
import torch

from refengine.backends.cpu.arrays import address
from refengine.backends.cpu.experts import Listed
from refengine.backends.cpu.program import LOG2E
from refengine.backends.cpu.verbs import Verbs, rows_of
from refengine.spec.moe import Routing
from refengine.spec.ops import Ops

SHARED = (
    "embed", "linear", "linear_pair", "mlp", "logits", "rms_norm", "ssd_scan", "route",
)  # fmt: skip


def array(a):
    """Return a tensor, or the tensors of a tuple or a Routing, as NumPy arrays; other values unchanged."""
    if isinstance(a, torch.Tensor):
        a = a.detach()
        if a.dtype == torch.bfloat16:
            return a.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return a.numpy()
    if isinstance(a, Routing):
        return Routing(*map(array, a))
    if isinstance(a, tuple) and a and isinstance(a[0], torch.Tensor):
        return tuple(map(array, a))
    return a


def tensor(a):
    """Return the arrays of a result as tensors."""
    if isinstance(a, np.ndarray):
        return torch.from_numpy(a)
    return Routing(*map(tensor, a)) if isinstance(a, Routing) else tuple(map(tensor, a))


def with_loops(ops: Ops, verbs: Verbs) -> Ops:
    """Return the operations in the compiled loops; those that the loops lack are taken from `ops`."""

    def shared(name: str):
        verb = getattr(verbs, name)

        @wraps(verb)
        def on_tensors(*arguments, **named):
            return tensor(verb(*map(array, arguments), **{key: array(a) for key, a in named.items()}))

        return on_tensors

    def experts(u, listed, routing, first=0):
        if not isinstance(listed, Listed) or not listed.readable:
            return ops.experts(u, listed, routing, first=first)
        return tensor(verbs.experts(array(u), listed, array(routing), first))

    def gated_rms_norm(y, z, weight, eps, groups, mean=None):
        if mean is not None:  # `mean` of several ranks takes tensors
            return ops.gated_rms_norm(y, z, weight, eps, groups, mean=mean)
        return tensor(verbs.gated_rms_norm(array(y), array(z), array(weight), eps, groups))

    def causal_conv(x, weight, bias, tail, lengths=None):
        taps = np.ascontiguousarray(array(weight)[:, 0].T)  # k c, as `place` stores them
        return tensor(verbs.causal_conv(array(x), taps, array(bias), array(tail), array(lengths)))

    def attention(q, k, v, cache, lengths=None):
        (b, l, h, e), before = q.shape, cache.length
        rows, step = rows_of(array(q), h * e)
        cache = cache.append(k, v, lengths)
        y, structure = torch.empty(b, l, h, e), cache.structure
        verbs.built.attend(
            address(rows), step, ctypes.addressof(structure), address(before), LOG2E / math.sqrt(e),
            address(y), b, l, h, k.shape[2], e, verbs.how,
        )  # fmt: skip
        return y, cache

    return replace(
        ops,
        gated_rms_norm=gated_rms_norm,
        causal_conv=causal_conv,
        attention=attention,
        experts=experts,
        **{name: shared(name) for name in SHARED},
    )

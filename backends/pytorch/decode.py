"""One position at a time on a CPU: the verbs again, as calls of the compiled loops.

A step of decoding is some three hundred small operations between the large products; one call for each verb
instead costs a third of the time. Each function returns what the verb of the same name returns, or None when
the case is not its own (several positions, another dtype), and then the verb itself is called; so it is
wherever an argument is given by name, as other ranks' share of a norm is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import wraps

import torch

from refengine.spec.moe import Routing
from refengine.spec.ops import Ops

LOG2E = math.log2(math.e)


def with_loops(ops: Ops, built, active: torch.dtype) -> Ops:
    """Return the vocabulary, with the compiled loops first where they can serve; `active`: of activations."""
    loops = LOOPS if active == torch.float32 else UNITS

    def first(name, loop):
        verb = getattr(ops, name)

        @wraps(verb)
        def either(*arguments, **named):
            result = None if named else loop(built, *arguments)
            return verb(*arguments, **named) if result is None else result

        return either

    return replace(ops, **{name: first(name, loop) for name, loop in loops.items()})


def short(x) -> bool:
    """Return whether x is b l .. float32 of one position, its channels side by side."""
    return x.dtype == torch.float32 and x.shape[1] == 1 and x.stride(-1) == 1 and not x.is_cuda


def address(lengths):
    """Return the address of lengths [b], or None."""
    return None if lengths is None else lengths.data_ptr()


def rms_norm(built, x, delta, weight, eps):
    """Return norm(x + delta) weight, and x + delta; or None."""
    if not short(x) or not x.is_contiguous():
        return None
    delta = None if delta is None else delta.contiguous()
    y, total = torch.empty_like(x), x if delta is None else torch.empty_like(x)
    there = None if delta is None else delta.data_ptr()
    built.rms_norm(
        x.data_ptr(), there, weight.data_ptr(), eps, y.data_ptr(), total.data_ptr(), len(x), x.shape[-1]
    )
    return y, total


def causal_conv(built, x, weight, bias, tail, lengths=None):
    """Return y b 1 c and the next tail; or None."""
    if not short(x) or not tail.is_contiguous() or weight.stride(0) != 1 or tail.dtype != x.dtype:
        return None
    b, _, c = x.shape
    y, after = x.new_empty(b, 1, c), torch.empty_like(tail)
    built.conv_step(
        x.data_ptr(), x.stride(0), weight.data_ptr(), bias.data_ptr(), tail.data_ptr(), address(lengths),
        y.data_ptr(), after.data_ptr(), b, c, tail.shape[1] + 1, torch.get_num_threads(),
    )  # fmt: skip
    return y, after


def ssd_scan(built, x, dt, A_log, B, C, D, dt_bias, S, lengths, dt_limit, chunk):
    """Return y b 1 h p and the next S; or None."""
    if not all(map(short, (x, dt, B, C))) or not S.is_contiguous():
        return None
    (b, _, h, p), (g, s) = x.shape, B.shape[2:]
    x, B, C = x.reshape(b, h * p), B.reshape(b, g * s), C.reshape(b, g * s)
    y, after = x.new_empty(b, 1, h, p), torch.empty_like(S)
    built.scan_step(
        S.data_ptr(), after.data_ptr(), x.data_ptr(), x.stride(0), dt.data_ptr(), dt.stride(0),
        A_log.data_ptr(), B.data_ptr(), B.stride(0), C.data_ptr(), C.stride(0), D.data_ptr(),
        dt_bias.data_ptr(), address(lengths), dt_limit[0], min(dt_limit[1], 3e38), y.data_ptr(),
        b, h, p, s, g, torch.get_num_threads(),
    )  # fmt: skip
    return y, after


def gated_rms_norm(built, y, z, weight, eps, groups):
    """Return b 1 c; or None."""
    if not short(y) or not short(z):
        return None
    y, out = y.contiguous(), torch.empty_like(y)
    width = y.shape[-1] // groups
    built.gated_rms_norm(
        y.data_ptr(), z.data_ptr(), z.stride(0), weight.data_ptr(), eps, out.data_ptr(), len(y), groups, width
    )
    return out


def route(built, hidden, gate, bias, cfg):
    """Return the routing of one position of each row; or None."""
    if not short(hidden) or cfg.n_group > 1:
        return None
    logits, k = torch.nn.functional.linear(hidden, gate).contiguous(), cfg.num_experts_per_tok
    expert, weight = (torch.empty(len(hidden), 1, k, dtype=dtype) for dtype in (torch.long, torch.float32))
    built.choose(
        logits.data_ptr(), bias.data_ptr(), len(hidden), len(bias), k, cfg.norm_topk_prob,
        cfg.routed_scaling_factor, expert.data_ptr(), weight.data_ptr(),
    )  # fmt: skip
    return Routing(expert, weight)


def attention(built, q, k, v, cache, lengths=None):
    """Return y b 1 h e and the next cache; or None."""
    known = {torch.float32: built.attend_float32, torch.bfloat16: built.attend_bfloat16}
    (b, l, h, e), kv, attend = q.shape, k.shape[2], known.get(cache.k.dtype)
    if l > 1 or q.is_cuda or attend is None or not cache.k.is_contiguous():
        return None
    rows, length, cache = q.float().contiguous(), cache.length, cache.append(k, v, lengths)
    y = torch.empty_like(rows)
    attend(
        rows.data_ptr(), cache.k.data_ptr(), cache.v.data_ptr(), length.data_ptr(), LOG2E / math.sqrt(e),
        y.data_ptr(), b, h, kv, cache.k.shape[2], e, torch.get_num_threads(),
    )  # fmt: skip
    return y.to(q.dtype), cache


LOOPS = {
    "rms_norm": rms_norm, "causal_conv": causal_conv, "ssd_scan": ssd_scan, "gated_rms_norm": gated_rms_norm,
    "route": route, "attention": attention,
}  # fmt: skip
UNITS = {"route": route, "attention": attention}  # those that serve bfloat16 activations

"""A faulty torch verb fails a test: each fault is one that a port of this model had, or could have."""

from dataclasses import replace

import numpy as np
import pytest

from refengine.conformance.cases import Case, terms
from refengine.spec.model import Model
from tests.backends.torch.test_laws import step, truth
from tests.support.torch_benches import Torch, torch

HOW = Torch("torch-float32", "float32")
CASE = Case(layers="M*E-M*E", batch=2, length=23, n_group=1, num_experts_per_tok=4, seed=7)


def norm_before_gate(ops):
    def gated(y, z, weight, eps, groups):
        ones = torch.full_like(z, 1e4)  # silu(1e4) / 1e4 = 1
        y = ops.gated_rms_norm(y, ones, weight, eps, groups)
        return y * torch.nn.functional.silu(z)

    return {"gated_rms_norm": gated}


def dt_clamped(ops):
    return {"ssd_scan": lambda *a: ops.ssd_scan(*a[:9], (0.001, float("inf")), a[10])}


def one_norm_over_all_groups(ops):
    return {"gated_rms_norm": lambda y, z, w, eps, groups: ops.gated_rms_norm(y, z, w, eps, 1)}


def convolution_turned_around(ops):
    return {"causal_conv": lambda x, w, *rest: ops.causal_conv(x, w.flip(-1), *rest)}


def tail_after_the_activation(ops):
    def conv(x, w, bias, tail, n=None):
        y, tail = ops.causal_conv(x, w, bias, tail, n)
        return y, torch.nn.functional.silu(tail)

    return {"causal_conv": conv}


def state_not_carried(ops):
    return {"ssd_scan": lambda *a: ops.ssd_scan(*a[:7], torch.zeros_like(a[7]), *a[8:])}


def state_in_bfloat16(ops):
    def scan(*a):
        y, S = ops.ssd_scan(*a)
        return y, S.bfloat16().float()

    return {"ssd_scan": scan}


def without_the_skip(ops):
    return {"ssd_scan": lambda *a: ops.ssd_scan(*a[:5], torch.zeros_like(a[5]), *a[6:])}


def kv_heads_interleaved(ops):
    def attention(q, k, v, cache, n=None):
        kv = k.shape[2]
        shuffled = q.unflatten(2, (-1, kv)).transpose(2, 3).flatten(2, 3)
        y, cache = ops.attention(shuffled, k, v, cache, n)
        return y.unflatten(2, (kv, -1)).transpose(2, 3).flatten(2, 3), cache

    return {"attention": attention}


def bias_weighs(ops):
    def route(h, gate, bias, cfg):
        routing = ops.route(h, gate, bias, cfg)
        s = torch.sigmoid(h.float() @ gate.T) + bias
        w = s.gather(-1, routing.expert)
        return routing._replace(weight=w / w.sum(-1, keepdim=True) * cfg.routed_scaling_factor)

    return {"route": route}


def relu_not_squared(ops):
    def mlp(h, up, down):
        return ops.linear(torch.relu(ops.linear(h, up)), down)

    return {"mlp": mlp}


def weights_not_scaled(ops):
    def route(*a):
        routing = ops.route(*a)
        return routing._replace(weight=routing.weight / a[3].routed_scaling_factor)

    return {"route": route}


def sound(ops):
    return {}


FAULTS = [
    norm_before_gate,
    dt_clamped,
    one_norm_over_all_groups,
    convolution_turned_around,
    tail_after_the_activation,
    state_not_carried,
    state_in_bfloat16,
    without_the_skip,
    kv_heads_interleaved,
    bias_weighs,
    relu_not_squared,
    weights_not_scaled,
]


def agrees(fault) -> bool:
    """Return whether a model with this fault, read in three calls, agrees with the definition."""
    here = HOW()
    here = replace(here, ops=replace(here.ops, **fault(here.ops)))
    m, pieces = Model.build(CASE.cfg, CASE.read, here), []
    states = m.new_states(CASE.batch)
    for piece in (slice(0, 9), slice(9, 10), slice(10, CASE.length)):
        logits, states = step(m, CASE.ids[:, piece], states)
        pieces.append(logits)
    try:
        expected = np.array(truth(CASE, CASE.ids))
        HOW.near(np.concatenate(pieces, axis=1), expected, terms(CASE.cfg, CASE.length))
    except AssertionError:
        return False
    return True


def test_the_sound_backend_is_green():
    assert agrees(sound)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_goes_red(fault):
    assert not agrees(fault)

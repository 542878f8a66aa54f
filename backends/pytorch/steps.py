"""A whole decoding step on a CPU in compiled loops: a call for each layer instead of ten.

A step of a small model is a hundred calls and some three hundred tensors, which Python takes milliseconds to
make. Here the addresses of a model's weights are collected once, in the structures of kernels/mixers.cpp,
and a step is one call for each layer. It serves bfloat16 matrices and few rows, and computes in float32 even
where activations are bfloat16 elsewhere, for a step waits for the weights; what a layer remembers stays in
its dtype. Anything else takes the step through the verbs.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from backends.pytorch.decode import LOG2E
from backends.pytorch.experts import Listed
from backends.pytorch.products import FEW

KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "n": ctypes.c_int, "f": ctypes.c_float}
MOST = 3e38  # stands for infinity


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A structure of C whose fields are written "name:kind ..."."""
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, KINDS[kind]) for field, kind in pairs]})


NORM = "norm:p d:i eps:f "
Mamba = structure(
    "Mamba", NORM + "in_proj:p out_proj:p conv:p conv_bias:p A_log:p D:p dt_bias:p gate:p "
    "heads:i head_dim:i groups:i state:i kernel:i low:f high:f",
)  # fmt: skip
Attention = structure("Attention", NORM + "q:p k:p v:p o:p heads:i kv:i head_dim:i scale:f")
Experts = structure(
    "Experts", NORM + "gate:p bias:p shared_up:p shared_down:p fc1:p fc2:p up:p down:p "
    "count:i chosen:i width:i shared_width:i latent:i normalise:n factor:f",
)  # fmt: skip
Dense = structure("Dense", NORM + "up:p down:p width:i")


class Unknown(Exception):
    """A model that the loops cannot serve."""


class Program(NamedTuple):
    """What a step of one model needs."""

    weights: dict  # of the model, kept alive
    layers: list  # (letter, structure)
    final: torch.Tensor
    head: torch.Tensor


class Steps:
    """(model, ids [b], states) -> logits [b v] on the host, next states."""

    def __init__(self, built: ctypes.CDLL, few: int = FEW):
        self.built, self.few = built, few  # rows up to which the loops serve
        self.latest: tuple[dict, Program | None] = {}, None  # weights, and their program if there is one

    def __call__(self, model, ids, states: list):
        ids, program = model.backend.array(ids), self.program(model)
        if program is None or len(ids) > self.few:
            return plain(model, ids, states)
        return self.run(program, model, ids, states)

    def program(self, model) -> Program | None:
        if self.latest[0] is not model.weights:
            self.latest = model.weights, compiled(model)
        return self.latest[1]

    def run(self, program: Program, model, ids, states: list):
        built, b, threads = self.built, len(ids), torch.get_num_threads()
        x, before, after = model.embed(ids).float(), None, []  # x b d, a new tensor: it is changed in place
        delta = torch.empty_like(x)
        for (kind, layer), state in zip(program.layers, states, strict=True):
            where = ctypes.byref(layer), b, x.data_ptr(), before, delta.data_ptr()
            if kind == "M":
                state = state.own()
                tail = state.tail.float()
                built.mamba_step(*where, tail.data_ptr(), state.S.data_ptr(), threads)
                state = replace(state, tail=tail.to(state.tail.dtype))
            elif kind == "*":
                state = state.reserve(1)
                places = state.k.data_ptr(), state.v.data_ptr(), state.length.data_ptr(), state.k.shape[2]
                built.attention_step(*where, *places, state.k.dtype == torch.bfloat16, threads)
                state = state.advanced()
            elif kind == "E":
                built.experts_step(*where, threads)
            else:
                built.mlp_step(*where, threads)
            before = delta.data_ptr()
            after.append(state)
        h = torch.empty_like(x)
        eps = model.cfg.layer_norm_epsilon
        built.rms_norm(
            x.data_ptr(), before, program.final.data_ptr(), eps, h.data_ptr(), x.data_ptr(), b, x.shape[1]
        )
        v, d = program.head.shape
        logits = torch.empty(b, v)
        built.linear(program.head.data_ptr(), v, d, h.data_ptr(), b, logits.data_ptr(), threads)
        return logits.numpy(), after


def plain(model, ids, states: list):
    """The step through the verbs."""
    h, states = model.blocks(model.embed(ids[:, None]), states)
    return model.backend.fetch(model.head(h))[:, 0], states


def compiled(model) -> Program | None:
    """The program of a model, or None if the loops cannot serve it."""
    cfg, top = model.cfg, model.weights[""]
    head = top["embeddings.weight" if cfg.tie_word_embeddings else "lm_head.weight"]
    blocks = [model.weights[f"layers.{i}"] for i in range(len(cfg.layers))]
    try:
        matrix(head)
        pairs = zip(cfg.layers, blocks, strict=True)
        layers = [(kind, LAYERS[kind](cfg, w, w["mixer"])) for kind, w in pairs]
        return Program(model.weights, layers, top["norm_f.weight"], head)
    except Unknown:
        return None


def matrix(weight) -> int:
    """The address of a bfloat16 matrix."""
    if not isinstance(weight, torch.Tensor) or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        raise Unknown
    return weight.data_ptr()


def vector(weight) -> int:
    """The address of a small weight, float32, in whatever order it is kept."""
    if weight.dtype != torch.float32:
        raise Unknown
    return weight.data_ptr()


def norm(cfg, w) -> tuple:
    return vector(w["norm.weight"]), cfg.hidden_size, cfg.layer_norm_epsilon


def mamba(cfg, w, m) -> Mamba:
    low, high = cfg.time_step_limit
    if m["conv1d.weight"].stride(0) != 1:
        raise Unknown
    return Mamba(
        *norm(cfg, w), matrix(m["in_proj.weight"]), matrix(m["out_proj.weight"]),
        *(vector(m[key]) for key in ("conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias", "norm.weight")),
        cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.n_groups, cfg.ssm_state_size, cfg.conv_kernel,
        low, min(high, MOST),
    )  # fmt: skip


def attention(cfg, w, m) -> Attention:
    qkv = m["qkv_proj"]
    parts = qkv if isinstance(qkv, tuple) else qkv.split(cfg.qkv_widths)
    return Attention(
        *norm(cfg, w), *map(matrix, parts), matrix(m["o_proj.weight"]), cfg.num_attention_heads,
        cfg.num_key_value_heads, cfg.head_dim, LOG2E / math.sqrt(cfg.head_dim),
    )  # fmt: skip


def experts(cfg, w, m) -> Experts:
    listed = m["experts"]
    if cfg.n_group > 1 or not isinstance(listed, Listed):
        raise Unknown
    for pair in listed.matrices:
        for part in pair:
            matrix(part)
    latent = cfg.moe_latent_size
    fc1, fc2 = (matrix(m[f"{key}_latent_proj.weight"]) if latent else None for key in ("fc1", "fc2"))
    return Experts(
        *norm(cfg, w), vector(m["gate.weight"]), vector(m["gate.e_score_correction_bias"]),
        matrix(m["shared_experts.up_proj.weight"]), matrix(m["shared_experts.down_proj.weight"]), fc1, fc2,
        listed.up.data_ptr(), listed.down.data_ptr(), cfg.n_routed_experts, cfg.num_experts_per_tok,
        cfg.moe_intermediate_size, cfg.moe_shared_expert_intermediate_size, latent or 0, cfg.norm_topk_prob,
        cfg.routed_scaling_factor,
    )  # fmt: skip


def dense(cfg, w, m) -> Dense:
    up, down = matrix(m["up_proj.weight"]), matrix(m["down_proj.weight"])
    return Dense(*norm(cfg, w), up, down, cfg.intermediate_size)


LAYERS = {"M": mamba, "*": attention, "E": experts, "-": dense}

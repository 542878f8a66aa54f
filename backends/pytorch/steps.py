"""A whole decoding step on a CPU in compiled loops: a call for each layer instead of ten.

A step of a small model is a hundred calls and some three hundred tensors, which Python takes milliseconds to
make. Here the addresses of a model's weights are collected once (program.py), and a step is one call for each
layer. It serves bfloat16 matrices and few rows, and computes in float32 even where activations are bfloat16
elsewhere, for a step waits for the weights; what a layer remembers stays in its dtype. Anything else takes
the step through the verbs.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch

from backends.pytorch.products import FEW
from backends.pytorch.program import Program, compiled


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

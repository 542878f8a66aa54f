"""A whole decoding step on a CPU in compiled loops: one call instead of a hundred.

A step of a small model is a hundred verbs and some three hundred tensors, which Python takes milliseconds to
make, the more so as all the weights that have just been read have driven it out of the processor's caches.
Here the addresses of a model's weights are collected once (program.py), and those of what its layers remember
in every step. It serves bfloat16 matrices and few rows, and computes in float32 even where activations are
bfloat16 elsewhere, for a step waits for the weights; what a layer remembers stays in its dtype. Anything else
takes the step through the verbs.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch

from refengine.backends.pytorch.interface import STRUCTURES
from refengine.backends.pytorch.products import FEW
from refengine.backends.pytorch.program import Program, compiled

REDUCE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)


class Steps:
    """(model, ids [b], states) -> logits [b v] on the host, next states.

    few    rows up to which the loops serve
    alone  whether no other rank has a part of the model
    taken  None, or 128 doubles to which seconds are added, by the letter of a layer's kind; 0: the head's
    """

    def __init__(self, built: ctypes.CDLL, few: int = FEW, alone: bool = True, taken=None):
        self.built, self.few, self.alone, self.taken = built, few, alone, taken
        self.latest: tuple[dict, Program | None] = {}, None  # weights, and their program if there is one

    def __call__(self, model, ids, states: list):
        ids, program = model.backend.array(ids), self.program(model)
        if program is None or len(ids) > self.few:
            return plain(model, ids, states)
        x = model.embed(ids).float()  # b d, a new tensor, which is changed
        before = [writable(kind, state) for kind, state in zip(program.kinds, states, strict=True)]
        places, length = remembered(program.kinds, before)
        whole, delta = program.whole, torch.empty_like(x)
        reduce = None if self.alone else Reduce(model.backend.ops.all_reduce, delta)
        out = torch.empty(len(ids), whole.vocabulary if self.alone else whole.norm.d)
        self.built.step(
            ctypes.byref(whole),
            len(ids),
            x.data_ptr(),
            delta.data_ptr(),
            places,
            length,
            reduce and reduce.call,
            out.data_ptr(),
            self.taken,
            torch.get_num_threads(),
        )
        if reduce:
            out = reduce.checked(model.head, out)
        return out.numpy(), list(map(written, program.kinds, states, before))

    def program(self, model) -> Program | None:
        """Return the program of the model, or None; that of the latest model is kept."""
        if self.latest[0] is not model.weights:
            self.latest = model.weights, compiled(model, self.alone)
        return self.latest[1]


class Reduce:
    """The sum over ranks after each layer, called from the loops; what it raises is raised after them."""

    def __init__(self, all_reduce, delta):
        self.all_reduce, self.delta, self.failed = all_reduce, delta, None
        self.call = REDUCE(self.run)

    def run(self, kind: int) -> int:
        """Return whether the sum of `delta` over ranks failed; called from the loops."""
        try:
            self.delta.copy_(self.all_reduce(self.delta, chr(kind)))
        except BaseException as failed:
            self.failed = failed
        return self.failed is not None

    def checked(self, verb, x):
        """Return verb(x), or raise what was raised in the loops."""
        if self.failed:
            raise self.failed
        return verb(x)


def writable(kind: str, state):
    """Return a state in arrays that may be written, with room for a position."""
    if kind == "M":
        state = state.own()
        return state if state.tail.dtype == torch.float32 else replace(state, tail=state.tail.float())
    return state.reserve(1) if kind == "*" else state


def written(kind: str, before, state):
    """Return the state after the step, in the dtype that it had."""
    if kind == "M" and state.tail.dtype != before.tail.dtype:
        return replace(state, tail=state.tail.to(before.tail.dtype))
    return state.advanced() if kind == "*" else state


def remembered(kinds: str, states: list) -> tuple[ctypes.Array, int | None]:
    """Return the addresses of the states, and of the lengths [b], the same in every layer that has them."""
    places, length = (STRUCTURES["State"] * len(states))(), None
    for place, kind, state in zip(places, kinds, states, strict=True):
        if kind == "M":
            place.first, place.second = state.tail.data_ptr(), state.S.data_ptr()
        elif kind == "*":
            place.first, place.second = state.k.data_ptr(), state.v.data_ptr()
            place.room, place.narrow = state.k.shape[2], state.k.dtype == torch.bfloat16
            length = state.length.data_ptr()
    return places, length


def plain(model, ids, states: list):
    """Return the logits [b v] and next states of the step through the verbs."""
    h, states = model.blocks(model.embed(ids[:, None]), states)
    return model.backend.fetch(model.head(h))[:, 0], states

"""A whole decoding step in compiled loops: one call instead of a hundred.

A step of a small model is a hundred verbs and some three hundred arrays,
which Python takes milliseconds to make,
the more so as all the weights that have just been read have driven it out of the processor's caches. Here the
addresses of a model's weights are collected once (program.py), and those of what its layers remember in every
step. It serves up to FEW rows, and computes in float32 even where activations are bfloat16 elsewhere, for a
step waits for the weights; what a layer remembers stays in its dtype. Anything else takes the step through
the verbs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from refengine.backends.cpu.arrays import address
from refengine.backends.cpu.interface import STRUCTURES
from refengine.backends.cpu.program import Program, compiled

REDUCE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
FEW = 32  # rows that a step serves


def same(a):
    """Return `a`."""
    return a


class Steps:
    """(model, ids [b], states) -> logits [b v] on the host, next states.

    run        the structure Run of the calls
    few        rows up to which the loops serve
    alone      whether no other rank has a part of the model
    host       from the backend's activations to NumPy arrays, in the same memory if they are float32
    here       the other way round
    writable   (kind of layer, state) -> the state in arrays that may be written, with room for a position
    written    (kind of layer, the state before, that after) -> the state that is returned
    taken      None, or 128 doubles to which seconds are added, by the letter of a layer's kind; 0: the head's
    """

    def __init__(
        self,
        built: ctypes.CDLL,
        run: ctypes.Structure,
        few: int = FEW,
        alone: bool = True,
        host: Callable[[Any], np.ndarray] = same,
        here: Callable[[np.ndarray], Any] = same,
        writable: Callable | None = None,
        written: Callable | None = None,
        taken=None,
    ):
        self.built, self.run, self.few, self.alone, self.taken = built, run, few, alone, taken
        self.host, self.here = host, here
        self.writable, self.written = writable or own, written or advanced
        self.latest: tuple[dict, Program | None] = {}, None  # weights, and their program if there is one

    def __call__(self, model, ids, states: list):
        program = self.program(model)
        ids = model.backend.array(ids)
        if program is None or len(ids) > self.few:
            return plain(model, ids, states)
        x = self.host(model.embed(ids))  # b d, a new array, which is changed
        before = [self.writable(kind, state) for kind, state in zip(program.kinds, states, strict=True)]
        places, length, _kept = remembered(program.kinds, before)
        whole, delta = program.whole, np.empty_like(x)
        reduce = None if self.alone else Reduce(model.backend.ops.all_reduce, delta, self.here, self.host)
        out = np.empty((len(ids), whole.vocabulary if self.alone else whole.norm.d), np.float32)
        self.built.step(
            ctypes.addressof(whole),
            len(ids),
            address(x),
            address(delta),
            places,
            length,
            reduce and reduce.call,
            address(out),
            self.taken,
            ctypes.addressof(self.run),
        )
        after = list(map(self.written, program.kinds, states, before))
        return (reduce.checked(model, out) if reduce else out), after

    def program(self, model) -> Program | None:
        """Return the program of the model, or None; that of the latest model is kept."""
        if self.latest[0] is not model.weights:
            self.latest = model.weights, compiled(model, self.alone)
        return self.latest[1]


class Reduce:
    """The sum over ranks after each layer, called from the loops; what it raises is raised after them."""

    def __init__(self, all_reduce, delta: np.ndarray, here, host):
        self.all_reduce, self.delta, self.here, self.host = all_reduce, delta, here, host
        self.failed: BaseException | None = None
        self.call = REDUCE(self.run)

    def run(self, kind: int) -> int:
        """Return whether the sum of `delta` over ranks failed; called from the loops."""
        try:
            self.delta[:] = self.host(self.all_reduce(self.here(self.delta), chr(kind)))
        except BaseException as failed:
            self.failed = failed
        return self.failed is not None

    def checked(self, model, out: np.ndarray) -> np.ndarray:
        """Return the logits on the host by the head of the model, or raise what was raised in the loops."""
        if self.failed:
            raise self.failed
        return model.backend.fetch(model.head(self.here(out)))


def own(kind: str, state):
    """Return a state in arrays that may be written, with room for a position."""
    if kind == "M":
        return state.own()
    return state.reserve(1) if kind == "*" else state


def advanced(kind: str, before, state):
    """Return the state after the step."""
    return state if kind in "E-" else state.advanced()


def remembered(kinds: str, states: list) -> tuple[ctypes.Array, int | None, list]:
    """Return the addresses of the states, and of the lengths [b], the same in every layer that has them.

    And the structures that the first point to, to be kept as long as they.
    """
    places, length, kept = (STRUCTURES["State"] * len(states))(), None, []
    for place, kind, state in zip(places, kinds, states, strict=True):
        if kind == "M":
            place.first, place.second = address(state.tail), address(state.S)
            place.key, place.read = address(state.key), address(state.position)
        elif kind == "*":
            kept.append(state.structure)
            place.first = ctypes.addressof(kept[-1])
            length = address(state.length)
    return places, length, kept


def plain(model, ids, states: list):
    """Return the logits [b v] and next states of the step through the verbs."""
    h, states = model.blocks(model.embed(ids[:, None]), states)
    return model.backend.fetch(model.head(h))[:, 0], states

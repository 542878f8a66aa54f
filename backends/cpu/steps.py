"""Run a whole decoding step in compiled loops: one call instead of a hundred.

A step of a small model is a hundred verbs and some three hundred arrays, which take Python milliseconds, and
more because reading the weights has evicted Python from the processor's caches. Here the addresses of a
model's weights are collected once (program.py), and those of its states in every step. Up to FEW rows are
served. The computation is in float32 even where activations are otherwise bfloat16, because memory limits a
step; states keep their dtype. Other calls take the step through the verbs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np

from refengine.backends.cpu.arrays import address
from refengine.backends.cpu.interface import STRUCTURES, filled
from refengine.backends.cpu.program import Program, compiled, compiled_head
from refengine.backends.cpu.state import Rows

REDUCE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
FEW = 32  # most rows of a step
MANY = 512  # most positions of a call that verifies drafts


def same(a):
    """Return `a`."""
    return a


class Steps:
    """(model, ids [b], states) -> logits [b v] on the host, next states.

    run        the structure Run of the calls
    few        rows up to which the loops serve
    alone      whether no other rank has a part of the model
    host       from activations of the backend to NumPy arrays, in the same memory if they are float32
    here       from NumPy arrays to activations of the backend
    writable   (kind of layer, state) -> the state in arrays that may be written, with room for a position
    written    (kind of layer, state before, state after) -> the state that is returned
    taken      None, or 128 doubles to which seconds are added, indexed by the letter of a layer; 0: the head
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
        self.latest: dict = {}  # weights
        self.programs: dict[bool, Program | None] = {}  # of them, and whether of the prediction head

    def __call__(self, model, ids, states: list):
        program = self.program(model)
        ids = model.backend.array(ids)
        if program is None or len(ids) > self.few:
            return plain(model, ids, states)
        x = self.host(model.embed(ids))  # b d, a new array, which is changed
        before = [self.writable(kind, state) for kind, state in zip(program.kinds, states, strict=True)]
        call = Call(program, before, np.ones(len(ids), np.int64))
        if self.alone:
            reduce, hidden, out = None, None, np.empty((len(ids), program.whole.vocabulary), np.float32)
        else:
            reduce = Reduce(model.backend.ops.all_reduce, np.empty_like(x), self.here, self.host)
            hidden, out = np.empty_like(x), None
        self.run_step(call, x, None, reduce, False, hidden, out)
        after = list(map(self.written, program.kinds, states, before))
        return (out if reduce is None or hidden is None else reduce.checked(model, hidden)), after

    def verify(self, model, rows: list[list[int]], states: list):
        """Return logits [l v] and hidden states [l d] of each row of tokens, and the record of the call.

        record(states, counts) returns the states after the first counts[b] tokens; until then they do not
        change. Returns None if the loops do not serve the model, or so many tokens.
        """
        program, count = self.program(model), np.array(list(map(len, rows)), np.int64)
        if program is None or not 0 < count.sum() <= MANY:
            return None
        x = self.host(model.embed(np.concatenate([np.asarray(row, np.int64) for row in rows])))  # rows d
        before = [
            state.tentative().reserve(int(count.max())) if kind == "*" else state
            for kind, state in zip(program.kinds, states, strict=True)
        ]
        record, hidden = Record(self, program, count), np.empty_like(x)
        out = np.empty((len(x), program.whole.vocabulary), np.float32)
        self.run_step(Call(program, before, count), x, record.places, None, False, hidden, out)
        ends = np.cumsum(count)[:-1]
        return np.split(out, ends), np.split(hidden, ends), record

    def run_step(
        self,
        call: Call,
        x,
        records=None,
        reduce: Reduce | None = None,
        last: bool = False,
        hidden=None,
        out=None,
    ) -> None:
        """Run the compiled step; see kernels/mixers.cpp."""
        delta = reduce.delta if reduce else np.empty_like(x)
        self.built.step(
            *call.places, address(x), address(delta), call.states, records, reduce and reduce.call, last,
            address(hidden), address(out), self.taken, ctypes.addressof(self.run),
        )  # fmt: skip

    def predict(self, model, v, lengths, states: list, logits: bool = True):
        """Return o [b 1 d] and logits [b v] at the last position of each row of the head, and next states.

        v: the input of the head's layers [rows d], lengths[b] positions of each row one after another.
        Returns None if the loops do not serve the head, or so many positions.
        """
        program, count = self.program(model, head=True), np.asarray(lengths, np.int64)
        if program is None or not 0 < len(v) <= MANY:
            return None
        before = [
            own(kind, state, int(count.max())) for kind, state in zip(program.kinds, states, strict=True)
        ]
        o = np.empty((len(count), 1, v.shape[1]), np.float32)
        out = np.empty((len(count), program.whole.vocabulary), np.float32) if logits else None
        self.run_step(Call(program, before, count), v, None, None, True, o, out)
        after = [
            advanced(kind, None, state, count) for kind, state in zip(program.kinds, before, strict=True)
        ]
        return o, out, after

    def program(self, model, head: bool = False) -> Program | None:
        """Return the program of the model or of its prediction head, or None; the latest are kept."""
        if self.latest is not model.weights:
            self.latest, self.programs = model.weights, {}
        if head not in self.programs:
            self.programs[head] = compiled_head(model) if head else compiled(model, self.alone)
        return self.programs[head]

    def close(self) -> None:
        """Free the weights of the latest model and its programs."""
        self.latest, self.programs = {}, {}


class Call:
    """The structures of one call: the model, its sequences and their states.

    count: positions of each sequence.
    """

    def __init__(self, program: Program, states: list, count: np.ndarray):
        self.program, self.states, length = program, (STRUCTURES["State"] * len(states))(), None
        self.kept: list = [states]  # arrays that the structures point to, kept alive
        for place, kind, state in zip(self.states, program.kinds, states, strict=True):
            if kind == "M":
                place.tail, place.S = self.addresses(state.tail), self.addresses(state.S)
                place.key, place.read = address(state.key), address(state.position)
            elif kind == "*":
                self.kept.append(state.structure)
                place.cache, length = ctypes.addressof(self.kept[-1]), state.length
        self.of = filled("Sequences", len(count), int(count.sum()), address(count), address(length))
        self.kept += count, length

    def addresses(self, a) -> int | None:
        """Return a pointer to the addresses of the rows of an array or a tensor."""
        if isinstance(a, Rows):
            return a.place
        self.kept.append(address(a) + np.arange(len(a), dtype=np.int64) * (a.nbytes // max(1, len(a))))
        return address(self.kept[-1])

    @property
    def places(self) -> tuple[int, int]:
        """Return the addresses of the model and of the sequences."""
        return ctypes.addressof(self.program.whole), ctypes.addressof(self.of)


class Record:
    """Holds, for each layer, the inputs of a call of several positions that change its state."""

    def __init__(self, steps: Steps, program: Program, count: np.ndarray):
        self.steps, self.program, self.count = steps, program, count
        rows, (*starts, end) = int(count.sum()), accumulate(program.recorded, initial=0)
        self.numbers = np.empty(rows * end, np.float32)
        first = address(self.numbers) or 0
        self.places = (ctypes.c_void_p * len(starts))(*(first + 4 * rows * start for start in starts))

    def __call__(self, states: list, counts) -> list:
        """Return the states after the first counts[b] positions of each row."""
        kept, kinds = np.asarray(counts, np.int64), self.program.kinds
        most = int(kept.max(initial=0))
        if not most:
            return states
        before = [own(kind, state, most) for kind, state in zip(kinds, states, strict=True)]
        call, run = Call(self.program, before, self.count), self.steps.run
        self.steps.built.replay(*call.places, address(kept), self.places, call.states, ctypes.addressof(run))
        return [advanced(kind, None, state, kept) for kind, state in zip(kinds, before, strict=True)]


class Reduce:
    """The sum over ranks after each layer, called from the loops; its exception is raised after they end."""

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
        """Return the logits of the model's head on the host, or raise the exception of a callback."""
        if self.failed:
            raise self.failed
        return model.backend.fetch(model.head(self.here(out)))


def own(kind: str, state, more: int = 1):
    """Return a state in writable arrays, with room for this many positions."""
    if kind == "M":
        return state.own()
    return state.reserve(more) if kind == "*" else state


def advanced(kind: str, before, state, count=1):
    """Return the state after `count` more positions, an int or [b]."""
    return state if kind in "E-" else state.advanced(count)


def plain(model, ids, states: list):
    """Return the logits [b v] and next states of the step through the verbs."""
    h, states = model.blocks(model.embed(ids[:, None]), states)
    return model.backend.fetch(model.head(h))[:, 0], states

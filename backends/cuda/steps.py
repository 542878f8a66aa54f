"""A decode step as one CUDA graph: some three hundred launches for the price of one.

A graph holds the addresses of everything it reads and writes. The verbs change states in place and lengths
are on the device, so a captured step serves as long as the same sequences go on in the same buffers; when
rows leave the batch, or a cache moves because it has grown, the step is captured again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refengine.backends.cuda.array import DeviceArray
from refengine.backends.cuda.attention import Cache

KEPT = 4  # graphs: each keeps the memory between its launches


class Step(NamedTuple):
    """A captured step of one model."""

    graph: Any
    model: Any
    ids: DeviceArray  # b 1 int32, to be filled before a replay
    logits: DeviceArray  # b v, there after it


class Steps:
    """(model, ids [b], states) -> logits [b v] on the host, next states."""

    def __init__(self, device):
        self.device = device
        self.warm = {}  # models by (id, batch): these have run, so that their kernels are compiled
        self.captured: dict[tuple, Step] = {}

    def __call__(self, model, ids, states: list):
        ids = np.asarray(ids, np.int32).reshape(-1, 1)
        states = [state.reserve(1) if isinstance(state, Cache) else state for state in states]
        if (id(model), len(ids)) not in self.warm:
            self.warm[id(model), len(ids)] = model  # kept, so that no other model gets its id
            logits, states = step(model, self.device.from_host(ids), states)
            return self.device.to_host(logits), states
        found = self.find(model, ids, states)
        self.device.upload(found.ids, ids)
        found.graph.replay()
        after = [state.advanced(1) if isinstance(state, Cache) else state for state in states]
        return self.device.to_host(found.logits), after

    def find(self, model, ids: np.ndarray, states: list) -> Step:
        """Return the graph of this step, captured if it is a new one."""
        key = id(model), len(ids), *(place for state in states if state for place in places(state))
        found = self.captured.pop(key, None)
        if found is None:
            while len(self.captured) >= KEPT:
                self.captured.pop(next(iter(self.captured)))  # the one not used for longest
            found = self.capture(model, self.device.from_host(ids), states)
        self.captured[key] = found
        return found

    def capture(self, model, ids: DeviceArray, states: list) -> Step:
        """Return a step whose launches are recorded as a graph."""
        result = []
        graph = self.device.capture(lambda: result.extend(step(model, ids, states)))
        return Step(graph, model, ids, result[0])

    def close(self) -> None:
        """Free the models and their graphs."""
        self.warm.clear()
        self.captured.clear()


def step(model, ids: DeviceArray, states: list):
    """Return the logits b v of one more position of each row, and the next states."""
    h, states = model.blocks(model.embed(ids), states)
    logits = model.head(h)
    return logits.reshape(len(ids), logits.shape[-1]), states


def places(state) -> list[tuple]:
    """Return where the arrays of a state lie, and how large they are."""
    return [(a.pointer, a.shape, a.dtype) for a in vars(state).values() if isinstance(a, DeviceArray)]

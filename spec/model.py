"""Chapter 14. The model: a stream of vectors, one for each token, to which every layer adds its output.

    x <- embeddings[ids]      x <- x + mixer(rms_norm(x)), each layer      logits = rms_norm(x) lm_head'

These are three calls, because pipeline stages, traces and the prediction head of chapter 15 begin and end
between them: `embed(ids)`, `blocks(x, states)`, `head(h)`. Prompts, ranks, traces and every feature use
this assembly. A backend may add a second one, for a decoding step in one call (`Backend.step`); tests hold
it to this one: tests/backends/torch/test_steps.py, tests/backends/cuda/test_steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from refengine.spec.arrays import Weight
from refengine.spec.config import Config
from refengine.spec.mixers import MIXERS, replay
from refengine.spec.ops import Backend, placed_by
from refengine.spec.tensors import Group, placed, table


@dataclass(frozen=True)
class Model:
    """A configuration, its placed weights (weights[block][group]), and the backend that placed them.

    scales: those of keys and values stored in FP8, by block; 1 where there are none.
    head_layer_norm: whether the final norm of the prediction head is a LayerNorm without a bias, as llama.cpp
        reads it; all others read an RMSNorm.
    """

    cfg: Config
    weights: dict
    backend: Backend
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    head_layer_norm: bool = False

    @classmethod
    def build(cls, cfg: Config, read: Callable[[str], Weight], backend: Backend) -> Model:
        """Return the model, each tensor of the table placed; read(name) is a tensor in the file's form."""

        def place(group: Group):
            return placed_by(backend, group, [read(row.name) for row in group.rows])

        return cls(cfg, placed(table(cfg), place), backend)

    def new_states(self, batch: int, first: int = 0, last: int | None = None) -> list:
        """Return the states of layers first..last-1 before the first token."""
        states = [self.backend.new_state(kind, self.cfg, batch) for kind in self.cfg.layers[first:last]]
        pairs = [(state, self.scales.get(f"layers.{i}")) for i, state in enumerate(states, first)]
        return [state.scaled(*scales) if scales else state for state, scales in pairs]

    def embed(self, ids):
        """Return the embeddings of ids: b l -> b l d."""
        return self.backend.ops.embed(ids, self.weights[""]["embeddings.weight"])

    def blocks(
        self, x, states: list, lengths=None, first: int = 0, last: int | None = None, tap=None, record=False
    ):
        """Run layers first..last-1, and the final norm after the last of all. b l d -> b l d, next states.

        `states` are those of exactly these layers; `tap(index, x)` sees the stream after each layer. With
        `record` the states stay as they were, and records of the layers, for `commit`, take their place.
        """
        last = len(self.cfg.layers) if last is None else last
        final = self.weights[""]["norm_f.weight"] if last == len(self.cfg.layers) else None
        layers = self.layers(first, last)
        return run_layers(x, layers, final, states, lengths, self.cfg, self.backend.ops, first, tap, record)

    def commit(self, states: list, records: list, counts, first: int = 0, last: int | None = None) -> list:
        """Return the states after the first counts[b] positions of each row of a recorded call."""
        return replayed(self.layers(first, last), states, records, counts, self.cfg, self.backend)

    def layers(self, first: int = 0, last: int | None = None) -> list:
        """Return (letter, weights) of layers first..last-1."""
        last = len(self.cfg.layers) if last is None else last
        return [(self.cfg.layers[i], self.weights[f"layers.{i}"]) for i in range(first, last)]

    def head(self, h, positions=None):
        """Return logits, b l d -> b l v; or, with `positions` [b], of one of each sequence: b v."""
        tied = self.cfg.tie_word_embeddings
        if positions is not None:
            h = h[np.arange(len(positions)), positions]
        return self.backend.ops.logits(h, self.weights[""]["embeddings.weight" if tied else "lm_head.weight"])


def run_layers(x, layers, final, states, lengths, cfg, ops, first=0, tap=None, record=False):
    """Run x <- x + mixer(rms_norm(x)) for each (letter, weights); `final`: weight of a last norm, or None."""
    delta, after = None, []
    for i, ((kind, w), state) in enumerate(zip(layers, states, strict=True), first):
        h, x = ops.rms_norm(x, delta, w["norm.weight"], cfg.layer_norm_epsilon)
        if record and state:
            state = state.tentative()
        delta, state = MIXERS[kind](h, w["mixer"], cfg, state, lengths, ops, record)
        after.append(state)
        if tap:
            tap(i, x + delta)
    if final is None:
        return (x if delta is None else x + delta), after
    return ops.rms_norm(x, delta, final, cfg.layer_norm_epsilon)[0], after


def replayed(layers, states, records, counts, cfg, backend):
    """Return the states after the first counts[b] (on the host) positions of each row of a recorded call."""
    counts = np.asarray(counts)
    most = int(counts.max(initial=0))
    if not most:
        return states
    lengths = None if (counts == most).all() else backend.array(counts)
    return [
        replay(kind, record, w["mixer"], cfg, state, most, lengths, backend.ops)
        for (kind, w), record, state in zip(layers, records, states, strict=True)
    ]

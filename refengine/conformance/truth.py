"""The answer of a case: the spec's definition in float64, one sequence at a time, in one call.

Rounding alone does not say how far a right answer may lie from it; a `Truth` also holds two measures.
  margin    Two experts whose scores differ by less than rounding may be chosen either way, and one flipped
            expert is not rounding: from its first such token on, a sequence is set apart.
  stretch   The gated norm divides by the size of its group. Where a gate closes on all of a group (of 7
            channels here, of 512 or more in the released models), that stretches the rounding before it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from ml_dtypes import finfo

from refengine.conformance.cases import Case, agree, terms
from refengine.spec.arrays import heads, widen
from refengine.spec.model import Model
from refengine.spec.moe import only_best_groups
from refengine.spec.norm import rms
from refengine.spec.numerics import sigmoid, silu, tolerance
from refengine.spec.ops import DEFINITION, Backend, Ops, numpy_backend
from refengine.spec.state import Cache, Recurrent


@dataclass(frozen=True)
class Truth:
    """The float64 results for one sequence of l tokens, and how sure its choices of experts are."""

    logits: np.ndarray  # l v
    hidden: np.ndarray  # l d, after the final norm
    stream: np.ndarray  # layer l d, after each layer
    states: list
    margin: np.ndarray  # l: by how much the router's closest choice at this position, in any layer, was won
    stretch: float

    def sure(self, dtype, size: int) -> int:
        """Return the number of positions before the first whose experts could have been chosen otherwise."""
        near = tolerance(dtype, size)
        if finfo(dtype).bits < 32:  # a router reads float32 or wider, of numbers rounded once a layer
            near = min(near, 4 * float(finfo(dtype).eps) * len(self.stream))
        close = np.flatnonzero(self.margin <= near)
        return int(close[0]) if len(close) else len(self.margin)


@lru_cache(maxsize=128)
def model(case: Case, backend: Backend) -> Model:
    """Return the model of a case, placed by a backend."""
    return Model.build(case.cfg, case.read, backend)


@lru_cache(maxsize=512)
def truth(case: Case, row: int, n: int | None = None) -> Truth:
    """Return the truth of the first n tokens of one of the case's sequences."""
    return truth_of(case, case.ids[row : row + 1, :n])


def truth_of(case: Case, ids: np.ndarray) -> Truth:
    """Return the truth of any sequence, ids [1 l]."""
    ops, margins, stretches = watched(DEFINITION, ids.shape[1])
    m = Model.build(case.cfg, case.read, numpy_backend(np.float64, ops=ops))
    if not ids.size:
        nothing = m.embed(ids)[0]
        return Truth(m.head(nothing), nothing, nothing[None], m.new_states(1), margins[0], 1.0)
    stream = []
    h, states = m.blocks(m.embed(ids), m.new_states(1), tap=lambda i, x: stream.append(x[0]))
    return Truth(m.head(h)[0], h[0], np.array(stream), states, np.min(margins, axis=0), max(stretches))


def watched(ops: Ops, length: int) -> tuple[Ops, list[np.ndarray], list[float]]:
    """Return verbs that note router margins [l] and stretches while they compute, and the two lists."""
    margins, stretches = [np.full(length, np.inf)], [1.0]

    def route(h, gate, bias, cfg):
        margins.append(router_margin(h, gate, bias, cfg)[0])
        return ops.route(h, gate, bias, cfg)

    def gated_rms_norm(y, z, weight, eps, groups):
        stretches.append(1 / rms(heads(y * silu(z), groups), eps).min())
        return ops.gated_rms_norm(y, z, weight, eps, groups)

    return replace(ops, route=route, gated_rms_norm=gated_rms_norm), margins, stretches


def router_margin(h, gate, bias, cfg):
    """Return by how much the last chosen expert (or group) beat the first one not chosen. b l d -> b l"""
    c = sigmoid(h @ widen(gate, h.dtype).T) + bias
    won = np.full(c.shape[:-1], np.inf)
    if cfg.n_group > 1:
        best_two = np.sort(c.reshape(*c.shape[:-1], cfg.n_group, -1), axis=-1)[..., -2:].sum(axis=-1)
        won = lead(best_two, cfg.topk_group)
        c = only_best_groups(c, cfg.n_group, cfg.topk_group)
    return np.minimum(won, lead(c, cfg.num_experts_per_tok))


def lead(c, k):
    """Return how far the k-th largest of the last axis lies above the next."""
    c = -np.sort(-c, axis=-1)
    return c[..., k - 1] - c[..., k] if k < c.shape[-1] else np.full(c.shape[:-1], np.inf)


def counted(tied: bool) -> bool:
    """Return `tied`, whether a comparison is cut short; Hypothesis counts it among its statistics."""
    hypothesis = sys.modules.get("hypothesis")
    if tied and hypothesis and hypothesis.currently_in_test_context():
        hypothesis.event("a router tie: set apart")
    return tied


def agree_with_truth(case: Case, row: int, logits, dtype, at: slice = slice(None)) -> None:
    """Check logits [l v] of one sequence, or of its positions `at`, against the truth, up to a router tie."""
    true, size = truth(case, row), terms(case.cfg, case.length)
    sure = true.sure(dtype, size)
    counted(sure < len(true.margin))
    positions = np.arange(len(true.logits))[at]
    keep = positions < sure
    expected = true.logits[positions[keep]]
    agree(np.asarray(logits)[keep], expected, dtype, size, f"logits of row {row}", true.stretch)


def same_states(case: Case, row: int, states: list, backend, n: int | None = None) -> None:
    """Check that the states of one sequence are those that reading it alone leaves behind."""
    true, size = truth(case, row, n), terms(case.cfg, case.length)
    if counted(true.sure(backend.dtype, size) < len(true.margin)):
        return
    for i, (state, expected) in enumerate(zip(states, true.states, strict=True)):
        pairs = []
        if isinstance(state, Recurrent):
            pairs = [
                ("tail", backend.fetch(state.tail)[row], expected.tail[0]),
                ("S", backend.fetch(state.S)[row], expected.S[0]),
            ]
        elif isinstance(state, Cache):  # a backend's own is opaque, and judged by the tokens that follow
            t = int(expected.length[0])
            if state.length[row] != t:
                raise AssertionError(f"length {state.length[row]} of layer {i}, not {t}")
            (k, v), (true_k, true_v) = state.upto(t), expected.upto(t)
            pairs = [("k", k[row], true_k[0]), ("v", v[row], true_v[0])]
        for name, mine, theirs in pairs:
            agree(mine, theirs, backend.dtype, size, f"{name} of layer {i}, row {row}", true.stretch)

"""Ties of the router go to the lowest index, on every backend, for any number of positions and for groups.

For h = 0 every expert has the score 1/2 exactly, and biases in eighths are added to it exactly. So experts
with the same bias tie to the last bit, whatever the order of summation, and so do groups of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.conformance.cases import Case

BIASES = st.lists(st.integers(-3, 3), min_size=12, max_size=12)


def chosen(backend, bias, k: int, groups: int, keep: int, shape, score: float = 0.5) -> np.ndarray:
    """Return the experts [.. k] that the backend chooses if every expert has the same score: 1/2 or 0."""
    case = Case(layers="E", n_routed_experts=12, n_group=groups if groups > 1 else 1)
    cfg = replace(case.cfg, n_group=groups, topk_group=keep, num_experts_per_tok=k)
    d = cfg.hidden_size

    def read(name):
        value = case.read(name)
        if name.endswith("gate.weight"):
            return np.full_like(value, 0 if score else -1)
        return np.asarray(bias, value.dtype) if name.endswith("correction_bias") else value

    w = backend.weights(case.cfg, read)
    h = backend.give(np.full((*shape, d), 0.0 if score else 1e5))
    routing = backend.ops.route(h, w["gate.weight"], w["gate.e_score_correction_bias"], cfg)
    return backend.fetch(routing.expert).reshape(*shape, k)


def read_off(c, k: int, groups: int, keep: int) -> list[int]:
    """Return the k best of c by sorting lists, best first; of equal ones the lowest index."""
    size = len(c) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    if groups > 1:
        best = sorted(range(groups), key=lambda g: (-sum(sorted(c[e] for e in members[g])[-2:]), g))[:keep]
        members = [members[g] for g in best]
    return sorted((e for group in members for e in group), key=lambda e: (-c[e], e))[:k]


@given(
    bias=BIASES,
    k=st.integers(1, 4),
    limited=st.sampled_from(((1, 1), (3, 1), (3, 2), (6, 3))),
    shape=st.sampled_from(((1, 1), (3, 1), (1, 3), (2, 40))),
)
@example(bias=[0] * 12, k=4, limited=(1, 1), shape=(1, 1))
@example(bias=[1, 2] * 6, k=4, limited=(1, 1), shape=(3, 1))
@example(bias=[0] * 12, k=4, limited=(3, 2), shape=(2, 1))
def test_of_equal_experts_the_lowest_is_chosen_by_any_call(backend, bias, k, limited, shape):
    groups, keep = limited
    k = min(k, keep * 12 // groups)
    expected = read_off(bias, k, groups, keep)
    experts = chosen(backend, np.array(bias) / 8, k, groups, keep, shape)
    for at in np.ndindex(shape):
        assert experts[at].tolist() == expected


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), (1, 40)])
@pytest.mark.parametrize("groups", [1, 3])
def test_nothing_and_minus_nothing_are_equal(backend, groups, shape):
    """A score of 0 plus a bias of -0.0 equals one plus 0.0: ties do not depend on the bits of zero."""
    bias = np.array([-0.0, 0.0, 0.0, -0.0] * 3)
    experts = chosen(backend, bias, 4, groups, max(1, groups - 1), shape, score=0.0)
    assert (experts == [0, 1, 2, 3]).all()

"""Checks of the router and of the routed experts, against readings of their equations in float64."""

from __future__ import annotations

import numpy as np

from refengine.conformance.cases import Case, agree
from refengine.conformance.checks import check, drawing, expect, one_of, readings
from refengine.conformance.truth import router_margin
from refengine.spec.layout import span
from refengine.spec.moe import Routing
from refengine.spec.numerics import tolerance, wide


def routed(backend, case: Case, h, read=None) -> list[dict[int, float]]:
    """Return {expert: weight} for each token, as the backend routes h [b l d]."""
    w = backend.weights(case.cfg, read or case.read)
    gate, bias = w["gate.weight"], w["gate.e_score_correction_bias"]
    routing = backend.ops.route(backend.give(h), gate, bias, case.cfg)
    tokens = [backend.fetch(a).reshape(-1, case.num_experts_per_tok).tolist() for a in routing]
    return [dict(zip(expert, weight, strict=True)) for expert, weight in zip(*tokens, strict=True)]


def lead(backend, case: Case, h, gap: float = 1.0) -> np.ndarray:
    """Return whether the choice of experts is sure, for each token of h [b l d]."""
    gate, bias = case.exact("gate.weight"), case.exact("gate.e_score_correction_bias")
    wider = wide(backend.dtype)  # scores are computed in float32 or wider, from what the dtype holds
    return router_margin(h, gate, bias, case.cfg) > gap * tolerance(wider, case.hidden_size)


def hiddens(backend, case: Case) -> np.ndarray:
    """Return the tokens that a layer of experts reads, h [b l d]."""
    return backend.exact(case.normal(0, case.batch, case.length, case.cfg.hidden_size))


@check("route", drawing("E"), examples=({"case": Case(layers="E", n_group=3, n_routed_experts=12)},),
       uses=("route",))  # fmt: skip
def the_router_chooses_and_weighs_as_the_equation_says(backend, case):
    """Check the choice by score plus bias, within the best groups, and weights by score, sum and scale."""
    h, d = hiddens(backend, case), case.cfg.hidden_size
    sure = lead(backend, case, h).reshape(-1)
    for token, weights in enumerate(routed(backend, case, h)):
        if sure[token]:  # otherwise either choice is right
            expected = readings.route(case, h.reshape(-1, d)[token])
            expect(
                sorted(weights) == sorted(expected),
                f"token {token}: {sorted(weights)}, not {sorted(expected)}",
            )
            right = list(expected.values())
            agree([weights[e] for e in expected], right, wide(backend.dtype), d, f"token {token}")


@check("route", drawing("E"), uses=("route",))
def a_tie_in_the_router_goes_to_the_lowest_index(backend, case):
    """Check h = 0 without a bias, where all experts score the same, and so do all groups."""

    def read(name):
        return case.read(name) * (0 if name.endswith("bias") else 1)

    for weights in routed(backend, case, np.zeros((1, 2, case.cfg.hidden_size)), read):
        chosen = list(range(case.cfg.num_experts_per_tok))
        expect(sorted(weights) == chosen, f"a tie goes to {sorted(weights)}, not to {chosen}")


@check("route", one_of(drawing("E"), shift=(-3.0, 3.0)), uses=("route",))
def a_bias_that_favours_no_expert_changes_nothing(backend, case, shift):
    """Check that the bias chooses and does not weigh, and that no score brings an excluded expert back."""

    def read(name):
        return case.read(name) + (np.float32(shift) if name.endswith("bias") else 0)

    h, d = hiddens(backend, case), case.cfg.hidden_size
    sure = lead(backend, case, h, 8).reshape(-1)  # s + 3 is rounded more coarsely than s
    plain, shifted = routed(backend, case, h), routed(backend, case, h, read)
    for token in np.flatnonzero(sure):
        expect(
            shifted[token].keys() == plain[token].keys(), f"token {token}: a constant bias changes the choice"
        )
        right = list(plain[token].values())
        agree([shifted[token][e] for e in plain[token]], right, wide(backend.dtype), d)


@check("route", drawing("E"), uses=("route",))
def experts_that_all_score_nothing_weigh_nothing(backend, case):
    """Check scores of 0: 0 / (0 + 1e-20), not 0 / 0."""
    w = case.exact("gate.weight")

    def read(name):
        return -np.abs(w).astype(np.float32) if name.endswith("gate.weight") else case.read(name)

    for weights in routed(backend, case, np.full((1, 1, case.cfg.hidden_size), 1e5), read):
        expect(not any(weights.values()), f"weights {list(weights.values())}, where every score is 0")


def weighted_sums(backend, case: Case, among: range) -> tuple[np.ndarray, np.ndarray]:
    """Return what a backend with these experts adds up, and what is right by its own routing: b l x each."""
    h, c = hiddens(backend, case), case.cfg
    u = backend.exact(case.normal(1, case.batch, case.length, c.expert_width))
    w = backend.weights(c, case.read)
    routing = backend.ops.route(backend.give(h), w["gate.weight"], w["gate.e_score_correction_bias"], c)
    kept = Routing(*(backend.fetch(a).reshape(*h.shape[:2], -1) for a in routing))
    part = backend.weights(c, case.read, experts=among)["experts"]
    y = backend.result(backend.ops.experts(backend.give(u), part, routing, among.start))
    expected = np.zeros_like(u)
    for b, t, k in np.ndindex(kept.expert.shape):
        if (e := int(kept.expert[b, t, k])) in among:
            up, down = (case.exact(f"experts.{e}.{which}_proj.weight") for which in ("up", "down"))
            expected[b, t] += float(kept.weight[b, t, k]) * readings.mlp(u[b, t], up, down)
    return y, expected


def terms_of(case: Case) -> int:
    """Return how many products one number of the experts' sum is made of."""
    return case.cfg.expert_width + case.cfg.num_experts_per_tok * case.cfg.moe_intermediate_size


@check("experts", drawing("E"), uses=("experts", "route"))
def the_routed_experts_are_a_weighted_sum(backend, case):
    """Check the sum over chosen experts, by the routing that the backend itself made."""
    y, expected = weighted_sums(backend, case, range(case.cfg.n_routed_experts))
    agree(y, expected, backend.dtype, terms_of(case))


@check("experts", one_of(drawing("E"), at=(0, 1, 2), parts=(2, 3)), uses=("experts", "route"))
def experts_of_a_part_leave_out_all_others(backend, case, at, parts):
    """Check a rank's share: choices of experts before its first and after its last add nothing."""
    y, expected = weighted_sums(backend, case, span(case.cfg.n_routed_experts, parts, at % parts))
    agree(y, expected, backend.dtype, terms_of(case))

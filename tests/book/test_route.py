"""The router: which experts read a token, and how much each counts."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, agree, cases
from refengine.conformance.truth import Truth, router_margin
from refengine.spec.numerics import tolerance

ROUTERS = cases("E")


def routed(backend, case: Case, h, read=None):
    """For each token {expert: weight}, as the backend routes h [b l d]."""
    w = backend.weights(case.cfg, read or case.read)
    gate, bias = w["gate.weight"], w["gate.e_score_correction_bias"]
    routing = backend.ops.route(backend.give(h), gate, bias, case.cfg)
    tokens = [backend.fetch(a).reshape(-1, case.num_experts_per_tok).tolist() for a in routing]
    return [dict(zip(expert, weight, strict=True)) for expert, weight in zip(*tokens, strict=True)]


def read_off(case: Case, h, block: str = "layers.0") -> dict[int, float]:
    """One token at a time, by sorting lists: groups first, then experts; on a tie the lowest index."""
    cfg = case.cfg
    s = 1 / (1 + np.exp(-(case.exact("gate.weight", block) @ h)))
    c = s + case.exact("gate.e_score_correction_bias", block)
    members = np.split(np.arange(cfg.n_routed_experts), cfg.n_group)
    if cfg.n_group > 1:
        best = sorted(range(cfg.n_group), key=lambda g: -sum(sorted(c[members[g]])[-2:]))
        members = [members[g] for g in sorted(best[: cfg.topk_group])]
    chosen = sorted(np.concatenate(members).tolist(), key=lambda e: (-c[e], e))[: cfg.num_experts_per_tok]
    total = sum(s[e] for e in chosen) if cfg.norm_topk_prob else 1.0
    return {e: s[e] / total * cfg.routed_scaling_factor for e in chosen}


@given(case=ROUTERS)
@example(case=Case(layers="E", n_group=3, n_routed_experts=12))
def test_the_router_chooses_and_weighs_as_the_equation_says(backend, case):
    """By score plus bias, within the best groups; weighed by the score, over the sum, times the scale."""
    h, d = case.normal(0, case.batch, case.length, case.cfg.hidden_size), case.cfg.hidden_size
    gate, bias = case.exact("gate.weight"), case.exact("gate.e_score_correction_bias")
    sure = router_margin(h, gate, bias, case.cfg).reshape(-1) > tolerance(backend.dtype, d)
    for token, weights in enumerate(routed(backend, case, h)):
        if sure[token]:  # otherwise either choice is right
            expected = read_off(case, h.reshape(-1, d)[token])
            assert sorted(weights) == sorted(expected), f"token {token}"
            agree([weights[e] for e in expected], list(expected.values()), backend.dtype, d, f"token {token}")


@given(case=ROUTERS)
def test_a_tie_in_the_router_goes_to_the_lowest_index(backend, case):
    """For h = 0 and no bias all experts score the same, and so do all groups."""

    def read(name):
        return case.read(name) * (0 if name.endswith("bias") else 1)

    for weights in routed(backend, case, np.zeros((1, 2, case.cfg.hidden_size)), read):
        assert sorted(weights) == list(range(case.cfg.num_experts_per_tok))


@given(case=ROUTERS, shift=st.sampled_from((-3.0, 3.0)))
def test_a_bias_that_favours_no_expert_changes_nothing(backend, case, shift):
    """It chooses and does not weigh; and who is out of the choice is out of it, whatever the others score."""

    def read(name):
        return case.read(name) + (np.float32(shift) if name.endswith("bias") else 0)

    h, d = case.normal(0, case.batch, case.length, case.cfg.hidden_size), case.cfg.hidden_size
    gate, bias = case.exact("gate.weight"), case.exact("gate.e_score_correction_bias")
    margin = router_margin(h, gate, bias, case.cfg).reshape(-1)
    sure = margin > 8 * tolerance(backend.dtype, d)  # s + 3 is rounded more coarsely than s
    plain, shifted = routed(backend, case, h), routed(backend, case, h, read)
    for token in np.flatnonzero(sure):
        assert shifted[token].keys() == plain[token].keys(), f"token {token}"
        agree([shifted[token][e] for e in plain[token]], list(plain[token].values()), backend.dtype, d)


@given(case=ROUTERS)
def test_experts_that_all_score_nothing_weigh_nothing(backend, case):
    """0 / (0 + 1e-20), not 0 / 0."""
    w = case.exact("gate.weight")

    def read(name):
        return -np.abs(w).astype(np.float32) if name.endswith("gate.weight") else case.read(name)

    for weights in routed(backend, case, np.full((1, 1, case.cfg.hidden_size), 1e5), read):
        assert list(weights.values()) == [0.0] * case.cfg.num_experts_per_tok


def test_a_tie_is_seen_and_set_apart():
    """Two experts with one gate: a token that wants only one of them could have had the other."""
    case = Case(layers="E", length=40, batch=1)
    h, gate = case.normal(0, 1, 40, case.hidden_size), case.exact("gate.weight")
    gate[3] = gate[4]
    bias = case.exact("gate.e_score_correction_bias")
    bias[3] = bias[4]
    margin = router_margin(h, gate, bias, case.cfg)[0]
    assert 0 < (margin == 0).sum() < 40
    true = Truth(logits=h[0], hidden=h[0], stream=h, states=[], margin=margin, stretch=1.0)
    assert true.sure(np.float32, 26) <= np.flatnonzero(margin == 0)[0]

"""The router chooses the experts of each token, and their weights."""

import numpy as np

from refengine.conformance.cases import Case
from refengine.conformance.checks import experts as operations_experts
from refengine.conformance.truth import Truth, router_margin
from tests.support.checks import test_of

test_the_router_chooses_and_weighs_as_the_equation_says = test_of(
    operations_experts.the_router_chooses_and_weighs_as_the_equation_says
)
test_a_tie_in_the_router_goes_to_the_lowest_index = test_of(
    operations_experts.a_tie_in_the_router_goes_to_the_lowest_index
)
test_a_bias_that_favours_no_expert_changes_nothing = test_of(
    operations_experts.a_bias_that_favours_no_expert_changes_nothing
)
test_experts_that_all_score_nothing_weigh_nothing = test_of(
    operations_experts.experts_that_all_score_nothing_weigh_nothing
)


def test_a_tie_is_seen_and_set_apart():
    """Two experts have the same gate: a token that selects one of them could have selected the other."""
    case = Case(layers="E", length=40, batch=1)
    h, gate = case.normal(0, 1, 40, case.hidden_size), case.exact("gate.weight")
    gate[3] = gate[4]
    bias = case.exact("gate.e_score_correction_bias")
    bias[3] = bias[4]
    margin = router_margin(h, gate, bias, case.cfg)[0]
    assert 0 < (margin == 0).sum() < 40
    true = Truth(logits=h[0], hidden=h[0], stream=h, states=[], margin=margin, stretch=1.0)
    assert true.sure(np.float32, 26) <= np.flatnonzero(margin == 0)[0]

"""Each planted fault in the experts, the prediction head and the reading of a checkpoint fails a test."""

from functools import partial

import refengine.spec.keys
from refengine.conformance.cases import Case
from refengine.conformance.mistakes import layers as wrong_layers
from refengine.conformance.mistakes import named
from refengine.spec.config import InputError
from refengine.spec.ops import DEFINITION
from tests.book import test_config, test_experts, test_mtp, test_numerics, test_route
from tests.book import test_tensor_table as counts
from tests.faults import test_teeth
from tests.support import faults as bad
from tests.support.teeth import Fault, each, known, law, plain, setting, vector
from tools.releases import CONFIGS

E = Case(layers="E", n_group=3, n_routed_experts=12)
HEAD = Case(layers="M", mtp_layers="*E", length=9, seed=1)
ROUTE = law(test_route.test_the_router_chooses_and_weighs_as_the_equation_says, case=E)
TIES = law(test_route.test_a_tie_in_the_router_goes_to_the_lowest_index, case=Case(layers="E"))
NOTHING = law(test_route.test_experts_that_all_score_nothing_weigh_nothing, case=E)
SHIFTED = law(test_route.test_a_bias_that_favours_no_expert_changes_nothing, case=E, shift=-3.0)
EXPERTS = law(test_experts.test_the_experts_are_what_the_equation_says, case=E)
MTP = law(test_mtp.test_the_head_in_pieces_is_what_the_fact_sheet_says, case=HEAD, cuts=[4])
LATENT, PLAIN, MLP = vector("experts/latent"), vector("experts/plain"), vector("mlp/relu2")
BIAS, GROUPS, LOOSE = vector("route/bias"), vector("route/groups"), vector("route/not-normalised")
LIST_WINS = plain(test_config.test_the_list_wins_over_the_pattern)
EITHER_NAMING = test_config.test_the_layers_may_be_a_list_in_either_naming
NEW_NAMES = plain(EITHER_NAMING, test_config.NEW_LIST, "layer_types")
END_TOKENS = plain(test_config.test_one_end_token_or_two)
EVERY_NUMBER = plain(test_numerics.test_every_half_precision_number_is_widened_to_itself, "BF16", "float32")
LIGHTNING = plain(counts.test_the_totals_are_the_published_ones, *counts.LIGHTNING)
OLD_NAMES = {name: letter for letter, name in test_config.LIST.items()}


def router(**wrong):
    return {"route": partial(wrong_layers.router(**wrong), DEFINITION.route, None)}


def without_its_experts(model):
    return [row for row in counts.table(CONFIGS[model]) if row.block != "mtp.layers.1"]


FAULTS = [
    # experts
    known("an expert has a gate projection", LATENT),
    known("relu is not squared", MLP),
    known("a token is weighed before its expert", PLAIN),
    known("the router reads the latent", LATENT),
    known("the shared expert reads the latent", LATENT),
    Fault("trap 6: the same, seen by a law", named("the shared expert reads the latent"), EXPERTS),
    known("the router is a softmax", BIAS),
    known("the correction bias weighs the experts", BIAS),
    known("weights are not normalised", BIAS),
    known("weights are normalised although norm_topk_prob is false", LOOSE),
    known("routed_scaling_factor is forgotten", BIAS),
    known("routed_scaling_factor is applied twice", BIAS),
    Fault("no 1e-20", router(guard=0.0), NOTHING),
    Fault("ties go to the highest", router(highest=True), TIES),
    known("groups do not limit the choice", GROUPS),
    known("a group scores its one best expert", ROUTE),
    known("experts of other groups score 0, not -inf", SHIFTED),
    # the prediction head
    known("the hidden comes before the embedding", MTP),
    Fault("trap 7: the hidden before the final norm", bad.hidden_before_the_final_norm, MTP),
    # reading
    Fault("trap 9: the pattern wins over the list", bad.pattern_before_list, LIST_WINS),
    Fault("trap 9: one naming", setting(refengine.spec.keys, "LETTER_OF", OLD_NAMES), NEW_NAMES, InputError),
    Fault("trap 10: only the first end token", bad.one_end_token, END_TOKENS),
    Fault("subnormals are flushed", setting(test_numerics, "widen", bad.flushing_widen), EVERY_NUMBER),
    Fault("the head's experts are not counted", setting(counts, "rows_of", without_its_experts), LIGHTNING),
]


@each(FAULTS)
def test_a_planted_fault_goes_red(fault, monkeypatch):
    fault.goes_red(monkeypatch)


def test_enough_faults_are_planted_and_the_traps_among_them():
    """All ten traps except trap 8, which is about packed weights."""
    said = [fault.what for fault in test_teeth.FAULTS + FAULTS]
    assert len(set(said)) == len(said) >= 20
    assert all(any(what.startswith(f"trap {i}:") for what in said) for i in (1, 2, 3, 4, 5, 6, 7, 9, 10))

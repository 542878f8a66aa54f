"""More planted faults that must go red: the experts, the prediction head, and the reading of a checkpoint."""

import refengine.spec.keys
import refengine.spec.mixers
from refengine.conformance.cases import Case
from refengine.spec.config import InputError
from refengine.spec.ops import DEFINITION
from tests.book import test_config, test_experts, test_mtp, test_numerics, test_route
from tests.book import test_tensor_table as counts
from tests.faults import test_teeth
from tests.support import faults_moe as bad
from tests.support.teeth import Fault, each, law, plain, setting, vector
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


def swapped_pair(x, y, weight):
    return DEFINITION.linear_pair(y, x, weight)


def router(**wrong):
    return {"route": bad.router(**wrong)}


def layer(**wrong):
    return lambda patch: patch.setitem(refengine.spec.mixers.MIXERS, "E", bad.moe_layer(**wrong))


def without_its_experts(model):
    return [row for row in counts.table(CONFIGS[model]) if row.block != "mtp.layers.1"]


FAULTS = [
    # experts
    Fault("trap 5: a gate projection", {"experts": bad.experts_of(bad.gated_mlp)}, LATENT),
    Fault("relu is not squared", {"mlp": bad.relu_mlp}, MLP),
    Fault("a token is weighed before its expert", {"experts": bad.experts_weighed_before}, PLAIN),
    Fault("trap 6: the router reads the latent", layer(router_reads_latent=True), LATENT),
    Fault("trap 6: the shared expert reads the latent", layer(shared_reads_latent=True), LATENT),
    Fault("trap 6: the same, seen by a law", layer(shared_reads_latent=True), EXPERTS),
    Fault("a softmax router", router(softmax=True), BIAS),
    Fault("the bias weighs", router(by_bias=True), BIAS),
    Fault("weights are not normalised", router(normalised=False), BIAS),
    Fault("weights are always normalised", router(normalised=True), LOOSE),
    Fault("no scale", router(scaled=False), BIAS),
    Fault("no 1e-20", router(guard=0.0), NOTHING),
    Fault("ties go to the highest", router(highest=True), TIES),
    Fault("groups do not limit", router(groups=False), GROUPS),
    Fault("a group is as good as its best expert", router(only_one=True), ROUTE),
    Fault("experts out of the choice score 0", router(mask=0.0), SHIFTED),
    # the prediction head
    Fault("trap 7: the hidden comes first", {"linear_pair": swapped_pair}, MTP),
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
    """All ten but trap 8, which is about packed weights."""
    said = [fault.what for fault in test_teeth.FAULTS + FAULTS]
    assert len(set(said)) == len(said) >= 20
    assert all(any(what.startswith(f"trap {i}:") for what in said) for i in (1, 2, 3, 4, 5, 6, 7, 9, 10))

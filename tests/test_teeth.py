"""The tests have teeth: each of these planted faults makes a recorded vector or a law go red.

A fault is a broken verb, or a broken piece of the spec. Its check is first seen green on the healthy backend.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

import spec.config
import spec.mixers
import spec.model
from spec.config import Config, InputError
from spec.conv import causal_conv
from spec.model import Model
from spec.ops import DEFINITION
from spec.state import Cache
from tests import (
    faults as bad, test_attention, test_config, test_conv, test_experts, test_laws, test_mtp, test_norm, test_numerics,
    test_route, test_scan, test_state, test_tensor_table)  # fmt: skip
from tests.benches import BENCHES
from tests.cases import Case
from tests.vectors import Vector, replay

M, A, E = Case(layers="M"), Case(layers="*"), Case(layers="E", n_group=3, n_routed_experts=12)
MODEL = Case(layers="M*EM", length=19)
HEAD = Case(layers="M", mtp_layers="*E", length=9, seed=1)


@dataclass(frozen=True)
class Fault:
    what: str
    plant: Callable | dict  # verbs of the backend; or (monkeypatch) -> None, for a piece of the spec
    check: Callable  # (backend) -> None
    raises: type = AssertionError


def vector(name: str):
    return lambda backend: replay(Vector(name), backend)


def law(test, **drawn):
    """A law of another file, on one case."""
    return lambda backend: test.hypothesis.inner_test(backend, **drawn)


def plain(test, *args):
    return lambda backend: test(*args)


def scan(change):
    return {"ssd_scan": bad.scan_with(change)}


def setting(target, name: str, value):
    return lambda patch: patch.setattr(target, name, value)


def hidden_before_the_final_norm(patch):
    right = spec.model.run
    patch.setattr(spec.model, "run", lambda x, layers, final, *rest: right(x, layers, None, *rest))


def norm_after_every_stage(patch):
    right = Model.blocks

    def blocks(self, x, states, n=None, first=0, last=None, tap=None):
        h, states = right(self, x, states, n, first, last, tap)
        return (h if last is None else h / np.sqrt((h * h).mean(-1, keepdims=True)).astype(h.dtype)), states

    patch.setattr(Model, "blocks", blocks)


def forks_write_over_each_other(patch):
    right = Cache.append

    def append(self, k, v, n=None):
        return right(dataclasses.replace(self, written=self.length.copy()), k, v, n)

    patch.setattr(Cache, "append", append)


def pattern_before_list(patch):
    right = spec.config._letters
    patch.setattr(spec.config, "_letters", lambda hf, lists, pattern: hf.get(pattern) or right(hf, lists, pattern))


SCAN_LAW = law(test_scan.test_a_scan_in_pieces_is_the_scan, case=dataclasses.replace(M, length=23), cuts=[9])
TAIL_LAW = law(test_conv.test_a_convolution_in_pieces_is_the_convolution, case=M, cuts=[5, 6])
RESUME = law(test_laws.test_stopping_and_resuming_changes_nothing, case=MODEL, cuts=[3, 8])
PADDING = law(test_laws.test_padding_is_invisible, case=MODEL, cuts=[3, 8], garbage=1e3)
ROUTE = law(test_route.test_the_router_chooses_and_weighs_as_the_equation_says, case=E)
MTP = law(test_mtp.test_the_head_in_pieces_is_what_the_fact_sheet_says, case=HEAD, cuts=[4])

FAULTS = [
    # Mamba-2
    Fault("trap 1: dt is clamped at 0.001", scan(lambda a: {"limit": (0.001, math.inf)}), vector("ssd_scan/small-steps")),
    Fault("the limit of the config is not obeyed", scan(lambda a: {"limit": (0.0, math.inf)}), vector("ssd_scan/limited")),
    Fault("A = exp(A_log)", {"ssd_scan": bad.bad_scan(sign=1)}, vector("ssd_scan/resumed")),
    Fault("heads read groups in turn", {"ssd_scan": bad.bad_scan(interleaved=True)}, vector("mamba2/two-groups")),
    Fault("no skip D x", {"ssd_scan": bad.bad_scan(skip=0)}, vector("ssd_scan/resumed")),
    Fault("dt_bias after the softplus", {"ssd_scan": bad.bad_scan(bias_first=False)}, vector("ssd_scan/resumed")),
    Fault("x enters the state without dt", {"ssd_scan": bad.bad_scan(stepped=False)}, vector("ssd_scan/resumed")),
    Fault("B and C change places", scan(lambda a: {"B": a["C"], "C": a["B"]}), vector("mamba2/two-groups")),
    Fault("a chunk forgets those before", {"ssd_scan": bad.bad_scan(forgets_every=11)}, SCAN_LAW),
    Fault("resuming loses S", scan(lambda a: {"S": a["S"] * 0}), RESUME),
    Fault("padding enters S", scan(lambda a: {"n": None}), PADDING),
    Fault("the kernel is flipped", {"causal_conv": bad.conv_with(weight=lambda w: w[..., ::-1])},
          vector("causal_conv/after-a-tail")),
    Fault("no SiLU on B and C", {"causal_conv": bad.silu_on_x_only(M)}, vector("mamba2/two-groups")),
    Fault("resuming loses the tail", {"causal_conv": bad.conv_with(tail=lambda t: t * 0)}, TAIL_LAW),
    Fault("padding enters the tail", {"causal_conv": bad.conv_with(n=lambda n: None)}, PADDING),
    Fault("the tail is kept after the activation", {"causal_conv": lambda x, w, b, t, n=None: (
        (y := causal_conv(x, w, b, t, n))[0], np.concatenate([t, y[0]], axis=1)[:, -t.shape[1]:])}, TAIL_LAW),
    Fault("trap 2: norm before gate", {"gated_rms_norm": bad.norm_before_gate}, vector("gated_rms_norm/two-groups")),
    Fault("norm over all of inner", {"gated_rms_norm": bad.norm_over_all}, vector("gated_rms_norm/two-groups")),
    Fault("trap 4: inner is expand x hidden", setting(Config, "mamba_inner", property(lambda c: 2 * c.hidden_size)),
          plain(test_config.test_nano_says_what_it_is)),
    # stream
    Fault("the norm multiplies by 1 + w", {"rms_norm": bad.norm_of_one_plus_w}, vector("model/dense")),
    Fault("the norm has no eps", {"rms_norm": bad.norm_without_eps}, test_norm.test_a_vector_of_zeros_stays_zeros),
    Fault("the residual is dropped", {"rms_norm": bad.norm_that_drops_the_residual}, vector("model/dense")),
    Fault("the embedding is scaled", {"embed": lambda ids, w: DEFINITION.embed(ids, w) * 5}, vector("model/dense")),
    Fault("every stage ends with a norm", norm_after_every_stage, law(
        test_laws.test_a_stage_of_some_layers_and_the_stage_of_the_rest_are_the_model, case=MODEL, middle=2)),
    Fault("the head gives the last row", setting(Model, "head", lambda self, h, rows=None: self.backend.ops.logits(
        h if rows is None else h[:, -1], self.weights[""]["lm_head.weight"])), law(
        test_laws.test_the_head_of_some_rows_is_these_rows_of_the_head, case=MODEL, data=3)),
    # attention
    Fault("trap 3: rope", {"attention": bad.rotary}, vector("attention/three-to-one")),
    Fault("rope, seen by a law", {"attention": bad.rotary}, law(
        test_attention.test_the_order_of_the_past_does_not_matter, case=A)),
    Fault("heads read key heads in turn", {"attention": bad.attention_with_heads_interleaved},
          vector("attention/three-to-one")),
    Fault("scores are not scaled", {"attention": bad.attention_without_scale}, vector("attention/three-to-one")),
    Fault("the future is seen", {"attention": bad.attention_to_the_future_too}, vector("attention/three-to-one")),
    Fault("padding enters the cache", {"attention": lambda q, k, v, cache, n=None: DEFINITION.attention(q, k, v, cache)},
          PADDING),
    Fault("forks write over each other", forks_write_over_each_other, law(
        test_state.test_whoever_joins_leaves_or_forks_every_sequence_reads_as_if_alone, case=Case(layers="*", length=1),
        moves=["read", "fork", "read"])),
    # experts
    Fault("trap 5: a gate projection", {"experts": bad.experts_of(bad.gated_mlp)}, vector("experts/latent")),
    Fault("relu is not squared", {"mlp": bad.relu_mlp}, vector("mlp/relu2")),
    Fault("a token is weighed before its expert", {"experts": bad.experts_weighed_before}, vector("experts/plain")),
    Fault("trap 6: the router reads the latent", lambda patch: patch.setitem(
        spec.mixers.MIXERS, "E", bad.moe_layer(router_reads_latent=True)), vector("experts/latent")),
    Fault("trap 6: the shared expert reads the latent", lambda patch: patch.setitem(
        spec.mixers.MIXERS, "E", bad.moe_layer(shared_reads_latent=True)), vector("experts/latent")),
    Fault("trap 6, seen by a law", lambda patch: patch.setitem(
        spec.mixers.MIXERS, "E", bad.moe_layer(shared_reads_latent=True)), law(
        test_experts.test_the_experts_are_what_the_equation_says, case=E)),
    Fault("a softmax router", {"route": bad.router(softmax=True)}, vector("route/bias")),
    Fault("the bias weighs", {"route": bad.router(by_bias=True)}, vector("route/bias")),
    Fault("weights are not normalised", {"route": bad.router(normalised=False)}, vector("route/bias")),
    Fault("weights are always normalised", {"route": bad.router(normalised=True)}, vector("route/not-normalised")),
    Fault("no scale", {"route": bad.router(scaled=False)}, vector("route/bias")),
    Fault("no 1e-20", {"route": bad.router(guard=0.0)}, law(
        test_route.test_experts_that_all_score_nothing_weigh_nothing, case=E)),
    Fault("ties go to the highest", {"route": bad.router(highest=True)}, law(
        test_route.test_a_tie_in_the_router_goes_to_the_lowest_index, case=Case(layers="E"))),
    Fault("groups do not limit", {"route": bad.router(groups=False)}, vector("route/groups")),
    Fault("a group is as good as its best expert", {"route": bad.router(only_one=True)}, ROUTE),
    Fault("experts out of the choice score 0", {"route": bad.router(mask=0.0)}, law(
        test_route.test_a_bias_that_favours_no_expert_changes_nothing, case=E, shift=-3.0)),
    # prediction head
    Fault("trap 7: the hidden comes first", {"linear_pair": lambda x, y, w: DEFINITION.linear_pair(y, x, w)}, MTP),
    Fault("trap 7: the hidden before the final norm", hidden_before_the_final_norm, MTP),
    # reading
    Fault("trap 9: the pattern wins over the list", pattern_before_list,
          plain(test_config.test_the_list_wins_over_the_pattern)),
    Fault("trap 9: only one naming", setting(spec.config, "LETTER_OF", test_config.NAMES_TO_LETTERS), plain(
        test_config.test_the_layers_may_be_a_list_in_either_naming, "layers_block_type", test_config.NEW_LIST), InputError),
    Fault("trap 10: only the first end token", setting(spec.config, "_listed", lambda v: v[:1] if isinstance(v, list) else [v]),
          plain(test_config.test_one_end_token_or_two)),
    Fault("subnormals are flushed", setting(test_numerics, "widen", lambda a, dtype: np.where(
        np.abs(a.astype(dtype)) < 1e-37, 0, a.astype(dtype)).astype(dtype)), plain(
        test_numerics.test_every_half_precision_number_is_widened_to_itself, "BF16", np.float32)),
    Fault("the head of the checkpoint is not counted", setting(test_tensor_table, "rows_of", lambda model: [
        row for row in test_tensor_table.table(test_tensor_table.CONFIGS[model]) if row.block != "mtp.layers.1"]),
        plain(test_tensor_table.test_the_totals_are_the_published_ones, "lightning", 6_513, 32_913_266_240, 1_335_325_952)),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_goes_red(fault, monkeypatch):
    healthy = BENCHES["numpy-float32"]()
    fault.check(healthy)
    sick = healthy
    if isinstance(fault.plant, dict):
        sick = dataclasses.replace(healthy, ops=dataclasses.replace(healthy.ops, **fault.plant))
    else:
        fault.plant(monkeypatch)
    with pytest.raises(fault.raises):
        fault.check(sick)


def test_enough_faults_are_planted_and_the_traps_among_them():
    """All ten but trap 8, which is of packed weights."""
    said = " ".join(fault.what for fault in FAULTS)
    assert len({fault.what for fault in FAULTS}) == len(FAULTS) >= 20
    assert all(f"trap {i}" in said for i in (1, 2, 3, 4, 5, 6, 7, 9, 10))

"""The tests have teeth: each of these planted faults makes a recorded vector or a law go red.

Here those of the Mamba, the stream and the attention; test_teeth_experts.py has the rest.
"""

import math
from dataclasses import replace

import numpy as np

from refengine.conformance.cases import Case
from refengine.spec.config import Config
from refengine.spec.conv import causal_conv
from refengine.spec.ops import DEFINITION
from refengine.spec.state import Cache
from tests.book import (
    test_attention,
    test_config,
    test_conv,
    test_laws,
    test_norm,
    test_records,
    test_scan,
    test_state,
)
from tests.support import faults as bad
from tests.support import faults_moe as spec_with
from tests.support.teeth import Fault, each, law, plain, setting, vector

M, A, MODEL = Case(layers="M"), Case(layers="*"), Case(layers="M*EM", length=19)
SCAN = law(test_scan.test_a_scan_in_pieces_is_the_scan, case=replace(M, length=23), cuts=[9])
TAIL = law(test_conv.test_a_convolution_in_pieces_is_the_convolution, case=M, cuts=[5, 6])
RESUME = law(test_laws.test_stopping_and_resuming_changes_nothing, case=MODEL, cuts=[3, 8])
PADDING = law(test_laws.test_padding_is_invisible, case=MODEL, cuts=[3, 8], garbage=1e3)
STAGES = law(test_laws.test_two_stages_of_some_layers_each_are_the_model, case=MODEL, middle=2)
ROWS = law(test_laws.test_the_head_of_some_rows_is_these_rows_of_the_head, case=MODEL, data=3)
SHUFFLED = law(test_attention.test_the_order_of_the_past_does_not_matter, case=A)
FORKS = law(
    test_state.test_whoever_joins_leaves_or_forks_every_sequence_reads_as_if_alone,
    case=Case(layers="*", length=1),
    moves=["read", "fork", "read"],
)
KEPT = law(
    test_records.test_a_recorded_call_kept_up_to_any_position_is_so_many_steps, case=MODEL, read=4, k=4
)
UNKEPT = law(test_records.test_a_record_that_is_not_kept_changes_nothing, case=MODEL, read=4, k=4)
IN_PLACE = law(test_records.test_keeping_a_part_of_a_record_copies_no_cache, case=MODEL, k=3)
SMALL_STEPS, LIMITED, RESUMED = (vector(f"ssd_scan/{case}") for case in ("small-steps", "limited", "resumed"))
MAMBA, CONV, GATED = (
    vector(name) for name in ("mamba2/two-groups", "causal_conv/after-a-tail", "gated_rms_norm/two-groups")
)
ZEROS = test_norm.test_a_vector_of_zeros_stays_zeros
ATTENTION, DENSE = vector("attention/three-to-one"), vector("model/dense")


def scan(**wrong):
    return {"ssd_scan": bad.bad_scan(**wrong)}


def scan_of(change):
    return {"ssd_scan": bad.scan_with(change)}


def conv(**wrong):
    return {"causal_conv": bad.conv_with(**wrong)}


def tail_after_the_activation(x, w, b, tail, n=None):
    y, _ = causal_conv(x, w, b, tail, n)
    return y, np.concatenate([tail, y], axis=1)[:, -tail.shape[1] :]


FAULTS = [
    # Mamba-2
    Fault("trap 1: dt is clamped at 0.001", scan_of(lambda a: {"limit": (0.001, math.inf)}), SMALL_STEPS),
    Fault("the limit of the config is not obeyed", scan_of(lambda a: {"limit": (0.0, math.inf)}), LIMITED),
    Fault("A = exp(A_log)", scan(sign=1), RESUMED),
    Fault("heads read groups in turn", scan(interleaved=True), MAMBA),
    Fault("no skip D x", scan(skip=0), RESUMED),
    Fault("dt_bias after the softplus", scan(bias_first=False), RESUMED),
    Fault("x enters the state without dt", scan(stepped=False), RESUMED),
    Fault("B and C change places", scan_of(lambda a: {"B": a["C"], "C": a["B"]}), MAMBA),
    Fault("a chunk forgets those before", scan(forgets_every=11), SCAN),
    Fault("resuming loses S", scan_of(lambda a: {"S": a["S"] * 0}), RESUME),
    Fault("padding enters S", scan_of(lambda a: {"n": None}), PADDING),
    Fault("the kernel is flipped", conv(weight=lambda w: w[..., ::-1]), CONV),
    Fault("no SiLU on B and C", {"causal_conv": bad.silu_on_x_only(M)}, MAMBA),
    Fault("resuming loses the tail", conv(tail=lambda t: t * 0), TAIL),
    Fault("padding enters the tail", conv(n=lambda n: None), PADDING),
    Fault("the tail is kept after the activation", {"causal_conv": tail_after_the_activation}, TAIL),
    Fault("trap 2: norm before gate", {"gated_rms_norm": bad.norm_before_gate}, GATED),
    Fault("norm over all of inner", {"gated_rms_norm": bad.norm_over_all}, GATED),
    Fault(
        "trap 4: inner is expand x hidden",
        setting(Config, "mamba_inner", property(lambda c: 2 * c.hidden_size)),
        plain(test_config.test_nano_says_what_it_is),
    ),
    # the stream
    Fault("the norm multiplies by 1 + w", {"rms_norm": bad.norm_of_one_plus_w}, DENSE),
    Fault("the norm has no eps", {"rms_norm": bad.norm_without_eps}, ZEROS),
    Fault("the residual is dropped", {"rms_norm": bad.norm_that_drops_the_residual}, DENSE),
    Fault("the embedding is scaled", {"embed": lambda ids, w: DEFINITION.embed(ids, w) * 5}, DENSE),
    Fault("every stage ends with a norm", spec_with.norm_after_every_stage, STAGES),
    Fault("the head gives the last row", spec_with.head_of_the_last_row, ROWS),
    # attention
    Fault("trap 3: rope", {"attention": bad.rotary}, ATTENTION),
    Fault("trap 3: rope, seen by a law", {"attention": bad.rotary}, SHUFFLED),
    Fault("heads read key heads in turn", {"attention": bad.attention_with_heads_interleaved}, ATTENTION),
    Fault("scores are not scaled", {"attention": bad.attention_without_scale}, ATTENTION),
    Fault("the future is seen", {"attention": bad.attention_to_the_future_too}, ATTENTION),
    Fault("padding enters the cache", {"attention": bad.attention_that_keeps_padding}, PADDING),
    Fault("forks write over each other", spec_with.forks_write_over_each_other, FORKS),
    # records
    Fault("all of a record is kept", spec_with.all_of_a_record_is_kept, KEPT),
    Fault("a commit forgets the tail", spec_with.commit_forgets_the_tail, KEPT),
    Fault("a recorded call moves the lengths", spec_with.recorded_call_moves_the_lengths, UNKEPT),
    Fault("a recorded call counts as written", setting(Cache, "tentative", lambda self: self), IN_PLACE),
]


@each(FAULTS)
def test_a_planted_fault_goes_red(fault, monkeypatch):
    fault.goes_red(monkeypatch)

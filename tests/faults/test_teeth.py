"""Each of these planted faults fails a recorded vector or a law.

These are faults of Mamba, the stream and attention; test_teeth_experts.py has the rest.
"""

from dataclasses import replace

from refengine.conformance.cases import Case
from refengine.conformance.mistakes import named
from refengine.spec.config import Config
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
from tests.support import faults as spec_with
from tests.support.teeth import Fault, each, known, law, plain, setting, vector

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


def dropping_the_residual(x, delta, weight, eps):
    return DEFINITION.rms_norm(x if delta is None else delta, None, weight, eps)


FAULTS = [
    # Mamba-2
    known("dt is held up at 0.001 in every call", SMALL_STEPS),
    known("dt is held up at 0.001 in calls of several tokens", SMALL_STEPS),
    known("the config's time_step_limit is not obeyed", LIMITED),
    known("A is exp(A_log), without the minus", RESUMED),
    known("head i reads group i % n_groups of B and C", MAMBA),
    known("the skip D x is left out", RESUMED),
    known("dt_bias is added after the softplus", RESUMED),
    known("x enters the state without dt", RESUMED),
    known("B and C change places", MAMBA),
    known("each chunk begins with an empty state", SCAN),
    known("each call begins with an empty state", RESUME),
    known("padding enters the state", PADDING),
    known("the state is kept in bfloat16", SCAN),
    known("the kernel of the convolution is flipped", CONV),
    known("SiLU is on x only, not on B and C", MAMBA),
    known("each call begins with an empty tail", TAIL),
    known("padding enters the tail", PADDING),
    known("the tail is kept after the activation", TAIL),
    known("the norm comes before the gate", GATED),
    known("the norm is over all of the inner width", GATED),
    known("the gate goes through sigmoid, not silu", GATED),
    Fault(
        "trap 4: inner is expand x hidden",
        setting(Config, "mamba_inner", property(lambda c: 2 * c.hidden_size)),
        plain(test_config.test_nano_says_what_it_is),
    ),
    # the stream
    known("the layer's norm multiplies by 1 + w", DENSE),
    known("the layer's norm has no eps", ZEROS),
    Fault("the residual is dropped", {"rms_norm": dropping_the_residual}, DENSE),
    known("the embedding is multiplied by sqrt(hidden_size)", DENSE),
    Fault("every stage ends with a norm", spec_with.norm_after_every_stage, STAGES),
    Fault("the head gives the last row", spec_with.head_of_the_last_row, ROWS),
    # attention
    known("rotary position embedding", ATTENTION),
    Fault("trap 3: rope, seen by a law", named("rotary position embedding"), SHUFFLED),
    known("query head i reads key head i % kv", ATTENTION),
    known("scores are not divided by sqrt(head_dim)", ATTENTION),
    known("scores outside the mask are 0, not -inf", ATTENTION),
    known("every token of the call is seen", ATTENTION),
    known("padding enters the cache", PADDING),
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

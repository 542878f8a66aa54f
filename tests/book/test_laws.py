"""Laws of the whole model: results depend neither on the cut of a sequence nor on the rest of its batch."""

from refengine.conformance.checks import laws, models
from tests.support.checks import test_of

test_stopping_and_resuming_changes_nothing = test_of(laws.stopping_and_resuming_changes_nothing)
test_padding_is_invisible = test_of(laws.padding_is_invisible)
test_the_company_in_a_batch_and_its_order_do_not_matter = test_of(
    laws.the_company_in_a_batch_and_its_order_do_not_matter
)
test_two_stages_of_some_layers_each_are_the_model = test_of(laws.two_stages_of_some_layers_each_are_the_model)
test_a_tap_sees_the_stream_after_each_layer = test_of(laws.a_tap_sees_the_stream_after_each_layer)
test_the_head_of_some_rows_is_these_rows_of_the_head = test_of(
    laws.the_head_of_some_rows_is_these_rows_of_the_head
)
test_a_prompt_and_then_one_token_at_a_time_is_the_sequence = test_of(
    models.a_prompt_and_then_one_token_at_a_time_is_the_sequence
)
test_a_ragged_batch_decodes_as_each_row_would_alone = test_of(
    models.a_ragged_batch_decodes_as_each_row_would_alone
)
test_a_step_in_one_call_is_a_step_of_the_verbs = test_of(models.a_step_in_one_call_is_a_step_of_the_verbs)
test_two_runs_give_the_same_bits = test_of(models.two_runs_give_the_same_bits)

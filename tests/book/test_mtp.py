"""The prediction head. Its witness is the fact sheet read literally: transformers leaves the head out."""

from refengine.conformance.candidate import numpy_bench
from refengine.conformance.checks import models, speculation
from tests.support.checks import test_of

test_the_head_in_pieces_is_what_the_fact_sheet_says = test_of(
    models.the_head_in_pieces_is_what_the_fact_sheet_says
)
test_the_head_tells_the_embedding_from_the_hidden = test_of(
    models.the_head_tells_the_embedding_from_the_hidden
)
test_one_head_runs_again_on_its_own_output = test_of(models.one_head_runs_again_on_its_own_output)
test_drafts_begin_from_rows_of_the_trunk = test_of(
    speculation.drafts_begin_from_rows_of_the_trunk_and_go_on_from_the_heads_own
)
test_a_call_with_drafts_is_so_many_steps = test_of(speculation.a_call_with_drafts_is_so_many_steps)
test_a_draft_is_kept_or_replaced_so_that_the_distribution_stays = test_of(
    speculation.a_draft_is_kept_or_replaced_so_that_the_distribution_stays, numpy_bench("float64")
)

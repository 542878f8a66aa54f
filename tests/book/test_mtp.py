"""The prediction head. Its witness is the fact sheet read literally: transformers leaves the head out."""

from refengine.conformance.checks import models
from tests.support.checks import test_of

test_the_head_in_pieces_is_what_the_fact_sheet_says = test_of(
    models.the_head_in_pieces_is_what_the_fact_sheet_says
)
test_the_head_tells_the_embedding_from_the_hidden = test_of(
    models.the_head_tells_the_embedding_from_the_hidden
)
test_one_head_runs_again_on_its_own_output = test_of(models.one_head_runs_again_on_its_own_output)

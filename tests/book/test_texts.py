"""Sampling, the tokenizer and the chat template agree with independent readings, without a backend."""

import numpy as np
import pytest

from refengine.conformance.candidate import numpy_bench
from refengine.conformance.checks import texts
from tests.support.checks import test_of

BENCH = numpy_bench("float32")  # no backend has a part in these


test_filters_apply_in_their_order = test_of(texts.filters_apply_in_their_order, BENCH)
test_a_draw_is_the_first_token_at_which_the_sum_exceeds_a_uniform_number = test_of(
    texts.a_draw_is_the_first_token_at_which_the_sum_exceeds_a_uniform_number, BENCH
)
test_a_text_has_the_ids_that_the_specification_gives_it = test_of(
    texts.a_text_has_the_ids_that_the_specification_gives_it, BENCH
)
test_a_conversation_is_written_as_the_chapter_says = test_of(
    texts.a_conversation_is_written_as_the_chapter_says, BENCH
)


def test_a_filter_at_its_border_is_told_apart():
    """For 0.5 + 0.5, rounding decides whether top_p = 0.5 includes the second token."""
    with pytest.raises(texts.AtABorder):
        texts.filtered(np.log([0.25, 0.25, 0.5]), texts.Sampling(top_p=0.5), [])

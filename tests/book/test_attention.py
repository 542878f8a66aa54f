"""Attention without position encoding: a softmax over all earlier tokens, independent of their positions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import agree, cut
from refengine.conformance.checks import attention as operations_attention
from refengine.conformance.checks import layers
from refengine.conformance.strategies import CUTS, cases
from refengine.spec.attention import attention, attention_in_blocks
from refengine.spec.ops import numpy_backend
from tests.support.checks import test_of

test_attention_in_pieces_is_what_the_equation_says = test_of(
    operations_attention.attention_in_pieces_is_what_the_equation_says
)
test_rows_of_different_lengths_do_not_see_padding = test_of(
    operations_attention.rows_of_different_lengths_do_not_see_padding
)
test_the_order_of_the_past_does_not_matter = test_of(
    operations_attention.the_order_of_the_past_does_not_matter
)
test_very_large_scores_do_not_overflow = test_of(operations_attention.very_large_scores_do_not_overflow)
test_the_attention_layer_is_what_the_equations_say = test_of(
    layers.the_attention_layer_is_what_the_equations_say
)


@given(case=cases("*"), block=st.integers(1, 9), cuts=CUTS)
def test_attention_in_blocks_is_attention(case, block, cuts):
    backend = numpy_backend(np.float64)
    at, e, (heads, kv) = (case.batch, case.length), case.head_dim, case.attention
    arrays = [case.normal(i, *at, count, e) for i, count in enumerate((heads, kv, kv))]
    one, other = (backend.new_state("*", case.cfg, case.batch) for _ in range(2))
    for piece in cut(case, cuts):
        here = [a[:, piece] for a in arrays]
        real = np.clip(case.lengths - piece.start, 0, here[0].shape[1])
        y, one = attention(*here, one, real)
        z, other = attention_in_blocks(*here, other, real, block=block)
        agree(z, y, np.float64, operations_attention.attention_size(case))

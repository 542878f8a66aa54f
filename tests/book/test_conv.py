"""The causal convolution: each channel is the sum over its last K values, then SiLU on all of x, B and C."""

from refengine.conformance.checks import mamba as operations_mamba
from tests.support.checks import test_of

test_the_last_tap_meets_the_current_token_and_silu_follows = test_of(
    operations_mamba.the_last_tap_meets_the_current_token_and_silu_follows
)
test_a_convolution_in_pieces_is_the_convolution = test_of(
    operations_mamba.a_convolution_in_pieces_is_the_convolution
)
test_the_tail_of_a_row_ends_where_the_row_does = test_of(
    operations_mamba.the_tail_of_a_row_ends_where_the_row_does
)

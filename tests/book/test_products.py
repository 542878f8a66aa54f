"""Lookups and matrix products: the embedding, linear layers, dense layers, logits."""

from refengine.conformance.checks import operations
from tests.support.checks import test_of

test_an_embedding_is_a_row_of_the_table = test_of(operations.an_embedding_is_a_row_of_the_table)
test_a_linear_layer_multiplies_by_the_matrix = test_of(operations.a_linear_layer_multiplies_by_the_matrix)
test_three_matrices_one_below_the_other_are_one_product = test_of(
    operations.three_matrices_one_below_the_other_are_one_product
)
test_a_pair_is_multiplied_end_to_end = test_of(operations.a_pair_is_multiplied_end_to_end)
test_an_mlp_squares_what_is_above_zero = test_of(operations.an_mlp_squares_what_is_above_zero)
test_logits_are_float32_or_wider = test_of(operations.logits_are_float32_or_wider)
test_one_rank_has_nothing_to_add = test_of(operations.one_rank_has_nothing_to_add)

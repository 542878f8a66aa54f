"""The experts: two matrices each with relu^2 between them, in the latent width if there is one."""

from refengine.conformance.checks import experts as operations_experts
from refengine.conformance.checks import layers
from tests.support.checks import test_of

test_the_routed_experts_are_a_weighted_sum = test_of(operations_experts.the_routed_experts_are_a_weighted_sum)
test_experts_of_a_part_leave_out_all_others = test_of(
    operations_experts.experts_of_a_part_leave_out_all_others
)
test_the_experts_are_what_the_equation_says = test_of(layers.the_experts_are_what_the_equation_says)
test_renaming_the_experts_changes_nothing = test_of(layers.renaming_the_experts_changes_nothing)
test_the_dense_layer_is_one_expert_that_everyone_reads = test_of(
    layers.the_dense_layer_is_one_expert_that_every_token_reads
)

"""The recurrence and the chunked scan agree with an independent reading of the equation."""

from refengine.conformance.checks import layers
from refengine.conformance.checks import mamba as operations_mamba
from tests.support.checks import test_of

test_the_scan_is_what_the_equation_says = test_of(operations_mamba.the_scan_is_what_the_equation_says)
test_a_scan_in_pieces_is_the_scan = test_of(operations_mamba.a_scan_in_pieces_is_the_scan)
test_beyond_the_end_of_a_row_the_state_neither_decays_nor_grows = test_of(
    operations_mamba.beyond_the_end_of_a_row_the_state_neither_decays_nor_grows
)
test_dt_is_clamped_to_the_limit_and_to_nothing_else = test_of(
    operations_mamba.dt_is_clamped_to_the_limit_and_to_nothing_else
)
test_a_fast_decay_forgets_and_does_not_overflow = test_of(
    operations_mamba.a_fast_decay_forgets_and_does_not_overflow
)
test_the_mamba_layer_is_what_the_equations_say = test_of(layers.the_mamba_layer_is_what_the_equations_say)

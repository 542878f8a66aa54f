"""The two norms."""

from refengine.conformance.checks import operations
from tests.support.checks import test_of

test_a_norm_adds_then_divides_by_the_root_mean_square_and_multiplies_by_plain_w = test_of(
    operations.a_norm_adds_then_divides_by_the_root_mean_square_and_multiplies_by_plain_w
)
test_the_gate_comes_before_the_norm_of_each_group = test_of(
    operations.the_gate_comes_before_the_norm_of_each_group
)


def test_a_vector_of_zeros_stays_zeros(backend):
    """eps is under the root, so 0 is not divided by 0."""
    operations.a_vector_of_zeros_stays_zeros(backend)
    operations.a_gated_vector_of_zeros_stays_zeros(backend)

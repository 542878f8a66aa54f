"""Widening is exact, and no function of numerics overflows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, agree, cases
from refengine.conformance.truth import agree_with_truth, model
from refengine.spec.arrays import DTYPES, widen
from refengine.spec.numerics import relu2, sigmoid, silu, softplus, tolerance
from refengine.spec.ops import numpy_backend
from refengine.spec.tensors import groups, table


@pytest.mark.parametrize("disk", ["BF16", "F16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_half_precision_number_is_widened_to_itself(disk, dtype):
    """All 65,536 of them: subnormals, both zeros, infinities and NaNs too."""
    narrow = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[disk])
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        wide = widen(narrow, dtype)
        back, nan = wide.astype(DTYPES[disk]), np.isnan(narrow.astype(np.float64))
    assert wide.dtype == dtype
    assert np.array_equal(np.isnan(wide), nan)
    assert np.array_equal(back.view(np.uint16)[~nan], narrow.view(np.uint16)[~nan])
    if disk == "BF16":
        exact = [reading_of_bfloat16(int(bits)) for bits in narrow.view(np.uint16)[~nan]]
        assert np.array_equal(wide[~nan].astype(np.float64), exact)


def reading_of_bfloat16(bits: int) -> float:
    sign, exponent, fraction = -1 if bits >> 15 else 1, bits >> 7 & 0xFF, bits & 0x7F
    if exponent == 0xFF:
        return sign * np.inf
    return sign * (fraction / 128 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 127)


def test_what_is_wide_enough_is_not_copied():
    a = np.ones(3, np.float32)
    assert widen(a, np.float32) is a


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_do_not_overflow(dtype):
    x = np.array([-1e4, -100, -1, 0, 1, 100, 1e4], dtype)
    with np.errstate(all="raise", under="ignore"):
        expected = [0, 0, np.exp(-1) / (1 + np.exp(-1)), 0.5, 1 / (1 + np.exp(-1)), 1, 1]
        agree(sigmoid(x), expected, dtype, 1, "sigmoid")
        agree(silu(x), x * np.array(expected), dtype, 1, "silu")
        plus = [0, 0, np.log1p(np.exp(-1)), np.log(2), np.log1p(np.e), 100, 1e4]
        agree(softplus(x), plus, dtype, 1, "softplus")
        agree(relu2(x), [0, 0, 0, 0, 1, 1e4, 1e8], dtype, 1, "relu2")
    assert {f(x).dtype for f in (sigmoid, silu, softplus, relu2)} == {np.dtype(dtype)}


def test_softplus_keeps_its_small_values():
    """A dt of 1e-30 is not rounded to 0, and there is no lower limit (trap 1)."""
    x = np.array([-69.0], np.float32)
    assert np.isclose(softplus(x)[0], np.exp(-69.0), rtol=float(np.finfo(np.float32).eps) * 69, atol=0)


def test_a_tolerance_grows_with_the_root_of_the_terms():
    assert tolerance(np.float32, 400) == pytest.approx(2 * tolerance(np.float32, 100))
    assert tolerance(np.float64, 100) < 1e-8 * tolerance(np.float32, 100)


@given(case=cases(max_length=8), disk=st.sampled_from(("BF16", "F16", "F32")), tied=st.booleans())
def test_weights_that_stay_in_the_file_dtype_mean_the_same(case, disk, tied):
    """Widened once or at every use; tied embeddings serve as the output layer."""
    case = replace(case, disk=disk, tied=tied)
    for dtype in (np.float32, np.float64):
        for resident in (True, False):
            m = model(case, numpy_backend(dtype, resident=resident))
            h, _ = m.blocks(m.embed(case.ids), m.new_states(case.batch))
            for row in range(case.batch):
                agree_with_truth(case, row, m.head(h)[row], dtype)
            assert ("lm_head.weight" in m.weights[""]) != tied


def test_a_mapped_matrix_is_the_file_array_itself():
    """It is not widened until it is used, so a model larger than memory runs."""
    in_proj = next(g for g in groups(table(Case(layers="M").cfg)) if g.name == "in_proj.weight")
    matrix = np.zeros((3, 2), DTYPES["BF16"])
    assert numpy_backend(np.float32, resident=False).place(in_proj, [matrix]) is matrix

"""Packed weights: the value of every code and scale, the rounding of values, and the cuts of a matrix."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec import quant
from refengine.spec.config import InputError
from refengine.spec.ops import linear
from refengine.spec.quant import E2M1, E4M3, Packed, fp8, mxfp8, nvfp4

BF16 = ml_dtypes.bfloat16
LAYOUTS = {
    "NVFP4": nvfp4,
    "four over six": lambda w: nvfp4(w, four_over_six=True),
    "W4A8": lambda w: nvfp4(w, block=32, top=quant.TOP_W4A8),
    "FP8": fp8,
    "MXFP8": mxfp8,
}
# The largest error of an element, as a share of the largest of its block (FP8: of the matrix): half a step,
# and what rounding the scale adds.
BOUNDS = {"NVFP4": 0.2, "four over six": 0.2, "W4A8": 0.2, "FP8": 0.037, "MXFP8": 0.073}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def matrix(rows=6, columns=96, seed=0, dtype=BF16, scale=0.02):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * scale).astype(dtype)


def same_bits(a, b):
    """Return whether two float32 arrays are equal, bit by bit; any NaN equals any other."""
    return ((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all()


def test_e4m3_is_the_type_of_the_name():
    assert same_bits(E4M3, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def test_e2m1_is_the_type_of_the_name_but_has_one_zero():
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert (codes == E2M1).all() and not np.signbit(E2M1[8])


def test_every_code_times_every_scale():
    """16 codes x 256 scales: e2m1 times (e4m3 times scale_2), in float32 and in this order."""
    codes = np.repeat(np.arange(16, dtype=np.uint8), 16)[None].repeat(256, axis=0)  # 256 scales, 16 blocks
    scale, scale_2 = np.arange(256, dtype=np.uint8)[:, None].repeat(16, axis=1), np.float32(1.2345e-3)
    packed = Packed("NVFP4", codes[:, ::2] | codes[:, 1::2] << 4, scale, scale_2)
    wanted = E2M1[codes] * np.repeat(E4M3[scale] * scale_2, 16, axis=1)
    assert packed.shape == (256, 256) and packed.block == 16
    assert same_bits(packed.dequantize(), wanted)


def test_the_low_half_of_a_byte_is_the_even_column():
    codes, scale = np.full((1, 8), 0x72, np.uint8), np.full((1, 1), 0x38, np.uint8)
    packed = Packed("NVFP4", codes, scale, np.float32(1))
    assert packed.dequantize()[0, :2].tolist() == [1, 6]


def test_every_code_of_fp8_and_every_exponent():
    codes = np.arange(256, dtype=np.uint8)[None]
    with np.errstate(invalid="ignore"):
        assert same_bits(
            Packed("FP8", codes, np.array(0.3, np.float32)).dequantize()[0], E4M3 * np.float32(0.3)
        )
    exponents = np.arange(255, dtype=np.uint8)[:, None]
    one = Packed("MXFP8", np.full((255, 32), 0x38, np.uint8), exponents).dequantize()
    assert (one[:, 0] == 2.0 ** (exponents[:, 0] - 127.0)).all()


def test_a_tie_goes_to_the_even_code():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    assert quant.to_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert quant.to_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    above, below = np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(0))
    assert quant.to_e2m1(above).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert quant.to_e2m1(below).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_to_e2m1_is_the_nearest_of_all():
    x = np.random.default_rng(0).uniform(-8, 8, 4000).astype(np.float32)
    assert (E2M1[quant.to_e2m1(x)] == x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)).all()


@pytest.mark.parametrize("layout", ["NVFP4", "FP8", "MXFP8"])
def test_packing_is_exact_once_packed(layout):
    """A packed matrix is packed again without loss, unless the largest of all scales is rounded."""
    pack = LAYOUTS[layout]
    once = pack(matrix(dtype=np.float32)).dequantize()
    assert np.abs(pack(once).dequantize() - once).max() <= 2e-7 * np.abs(once).max()


@each_layout
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(-30, 20), rows=st.integers(1, 5))
def test_the_error_is_within_the_bound_of_the_format(layout, seed, size, rows):
    w = matrix(rows, 64, seed, np.float32, 2.0**size)
    packed = LAYOUTS[layout](w)
    block = packed.block if layout != "FP8" else w.size
    largest = np.abs(w.reshape(-1, block)).max(axis=1, keepdims=True)
    if layout in ("NVFP4", "four over six", "W4A8"):  # a block far below the largest has too small a scale
        largest = np.maximum(largest, np.abs(w).max() * 6 * 2.0**-6 / 256)
    error = np.abs(packed.dequantize() - w).reshape(-1, block)
    assert (error <= BOUNDS[layout] * largest).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_four_over_six_is_worse_in_no_block_at_the_same_global_scale(seed):
    w = matrix(4, 64, seed, np.float32)
    six, four = nvfp4(w, top=quant.TOP_4_OVER_6), nvfp4(w, four_over_six=True)
    assert six.scale_2 == four.scale_2
    errors = [np.square(p.dequantize().astype(float) - w).reshape(-1, 16).sum(axis=1) for p in (six, four)]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all() and errors[1].sum() < errors[0].sum()


@each_layout
def test_zeros_stay_zeros(layout):
    w = matrix()
    w[1] = 0
    w[2, 32:64] = 0
    found = LAYOUTS[layout](w).dequantize()
    assert (found[w == 0] == 0).all() and np.isfinite(found).all()
    nothing = LAYOUTS[layout](np.zeros((2, 32), BF16))
    assert (nothing.dequantize() == 0).all() and np.isfinite(E4M3[nothing.codes]).all()


def test_modelopts_spelling_of_a_zero_matrix_means_zeros():
    zeros = Packed("NVFP4", np.full((2, 16), 0x77, np.uint8), np.full((2, 2), 0x7F, np.uint8), np.float32(0))
    assert (zeros.dequantize() == 0).all()
    assert (Packed("FP8", np.full((2, 16), 0xFF, np.uint8), np.zeros((), np.float32)).dequantize() == 0).all()


def test_blocks_far_below_the_largest_have_subnormal_scales():
    w = np.ones((1, 64), np.float32)
    w[0, 16:32], w[0, 32:48], w[0, 48:] = 2.0**-15, 2.0**-20, 0
    packed = nvfp4(w)
    assert E4M3[packed.scale][0, 1] < 2.0**-6 and packed.scale[0, 2] == 1  # subnormal; the least
    assert np.abs(packed.dequantize()[0, 16:32] / w[0, 16:32] - 1).max() < 0.1


def test_not_a_number_stays_one():
    w = np.ones((1, 32), np.float32)
    w[0, 3] = np.nan
    with np.errstate(invalid="ignore"):
        for pack in (lambda x: fp8(x, amax=1), mxfp8):
            assert np.isnan(pack(w).dequantize()[0, 3])


@each_layout
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BF16])
def test_a_packed_weight_computes_what_its_dequantized_matrix_computes(layout, dtype):
    packed, x = LAYOUTS[layout](matrix()), matrix(3, 96, 1, np.float32).astype(dtype)
    assert (linear(x, packed) == linear(x, packed.dequantize(dtype))).all()


@each_layout
@given(data=st.data())
def test_a_slice_of_a_packed_weight_is_the_slice_of_its_matrix(layout, data):
    packed = LAYOUTS[layout](matrix(5, 64))
    whole = packed.dequantize()
    a, b = sorted(data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5))))
    c, d = sorted(data.draw(st.tuples(st.integers(0, 32), st.integers(0, 32))))
    at = (slice(a, b), slice(2 * c, 2 * d))
    part = packed[at]
    assert part.shape == whole[at].shape and same_bits(part.dequantize(), whole[at])
    rest = [packed[a:b, : 2 * c], packed[a:b, 2 * d :]]
    assert same_bits(rest[0].joined([part, rest[1]], 1).dequantize(), whole[a:b])
    assert same_bits(packed[:a].joined([packed[a:b], packed[b:]], 0).dequantize(), whole)
    chosen = np.array([[4, 0], [2, 2]])
    assert same_bits(packed[chosen].dequantize(), whole[chosen]) and packed[chosen].shape == (2, 2, 64)


def test_half_a_byte_cannot_be_cut_off():
    with pytest.raises(InputError, match="columns 1 to 64 of NVFP4 weights are not whole bytes"):
        nvfp4(matrix(5, 64))[:, 1:]


@pytest.mark.parametrize(("layout", "bits"), [("NVFP4", 4.5), ("W4A8", 4.25), ("FP8", 8), ("MXFP8", 8.25)])
def test_the_bytes_are_those_of_the_format(layout, bits):
    packed = LAYOUTS[layout](matrix(64, 64))
    assert packed.nbytes - (4 if layout in ("NVFP4", "W4A8", "FP8") else 0) == packed.size * bits / 8


def test_inputs_are_rounded_as_hardware_rounds_them():
    x = matrix(3, 64, dtype=np.float32, scale=1.0)
    amax = np.abs(x).max()
    packed = nvfp4(matrix(5, 64))
    assert quant.rounded_inputs(x, packed) is x  # W4A16
    four = Packed("NVFP4", packed.codes, packed.scale, packed.scale_2, np.float32(amax / np.float32(2688)))
    assert same_bits(quant.rounded_inputs(x, four), nvfp4(x).dequantize())
    eight = Packed(
        "FP8", packed.codes, np.array(1, np.float32), input_scale=np.float32(amax / np.float32(448))
    )
    assert same_bits(quant.rounded_inputs(x, eight), fp8(x).dequantize())
    beyond = quant.rounded_fp8(np.array([1e3, -1e3], np.float32), 1.0)
    assert beyond.tolist() == [448, -448]  # a value that calibration did not see saturates

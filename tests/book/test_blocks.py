"""Blocks of GGUF files have the values of the package gguf; slices of them are slices of their matrix."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec.blocks import FORMATS, Blocks
from refengine.spec.numerics import tolerance
from refengine.spec.ops import linear, linear_in_strips
from refengine.spec.quant import nvfp4
from tests.support.gguf import random_blocks

KINDS = pytest.mark.parametrize("kind", FORMATS)


@KINDS
def test_blocks_mean_what_the_library_says(kind):
    at = gguf.GGMLQuantizationType[kind.upper()]
    assert gguf.GGML_QUANT_SIZES[at] == (FORMATS[kind].columns, FORMATS[kind].nbytes)
    weight = random_blocks(kind, (37, 3))
    np.testing.assert_array_equal(weight.dequantize(), gguf.quants.dequantize(weight.data, at))


@KINDS
@given(
    rows=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    blocks=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_a_slice_of_blocks_is_a_slice_of_the_matrix(kind, rows, blocks):
    weight = random_blocks(kind, (6, 3), scale=np.float32(0.25))
    whole, (first, last) = weight.dequantize(), (each * weight.block for each in sorted(blocks))
    part = weight[slice(*rows), first:last]
    np.testing.assert_array_equal(part.dequantize(), whole[slice(*rows), first:last])
    np.testing.assert_array_equal(weight[np.array([[5, 0], [2, 2]])].dequantize(), whole[[[5, 0], [2, 2]]])
    np.testing.assert_array_equal(weight[4].dequantize(), whole[4])
    assert part.shape == part.dequantize().shape and part.size == part.dequantize().size
    assert part.nbytes == part.size // weight.block * weight.format.nbytes


@KINDS
def test_slices_join_to_the_whole(kind):
    weight = random_blocks(kind, (5, 3))
    for axis, cut in ((0, 2), (1, 2 * weight.block)):
        parts = [weight[(slice(None),) * axis + (each,)] for each in (slice(0, cut), slice(cut, None))]
        joined = parts[0].joined(parts[1:], axis)
        np.testing.assert_array_equal(joined.data, weight.data)


@KINDS
def test_a_cut_within_a_block_is_a_slice_of_the_matrix(kind):
    weight = random_blocks(kind, (3, 2))
    part = weight[1:, 16 : weight.block + 16]
    assert isinstance(part, np.ndarray)
    np.testing.assert_array_equal(part, weight.dequantize()[1:, 16 : weight.block + 16])


@KINDS
def test_a_product_is_that_of_the_matrix(kind):
    weight = random_blocks(kind, (40, 2))
    x = np.random.default_rng(1).standard_normal((3, weight.shape[1]))
    np.testing.assert_array_equal(linear(x, weight), x @ weight.dequantize(np.float64).T)
    bound = np.abs(x) @ np.abs(weight.dequantize(np.float64)).T * tolerance(np.float64, weight.shape[1])
    assert (np.abs(linear_in_strips(x, weight, strip=512) - linear(x, weight)) <= bound).all()


def test_nvfp4_is_the_same_matrix_in_both_layouts():
    from refengine.checkpoint.gguf.write import to_blocks

    packed = nvfp4(np.random.default_rng(2).standard_normal((5, 192)).astype(np.float32), four_over_six=True)
    blocks = Blocks(FORMATS["nvfp4"], to_blocks(packed), packed.scale_2)
    np.testing.assert_array_equal(blocks.dequantize(), packed.dequantize())

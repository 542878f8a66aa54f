"""Packed weights give the results of their dequantized matrices, on every backend."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from refengine.conformance.candidate import bench, with_functions
from refengine.conformance.checks import packed
from refengine.conformance.report import Plan, report
from refengine.spec.blocks import FORMATS, Blocks
from refengine.spec.ops import REFERENCE, numpy_backend
from refengine.spec.quant import Packed, nvfp4
from tests.support.benches import BENCHES
from tests.support.checks import test_of

NUMPY = BENCHES["numpy-float32"]()
test_a_packed_matrix_times_unit_vectors_is_the_matrix = test_of(
    packed.a_packed_matrix_times_unit_vectors_is_the_matrix, NUMPY
)
test_a_packed_matrix_multiplies_as_the_matrix_it_stands_for = test_of(
    packed.a_packed_matrix_multiplies_as_the_matrix_it_stands_for, NUMPY
)
test_three_packed_matrices_are_one_product = test_of(packed.three_packed_matrices_are_one_product, NUMPY)
test_a_packed_mlp_is_the_mlp_of_its_matrices = test_of(packed.a_packed_mlp_is_the_mlp_of_its_matrices, NUMPY)
test_packed_logits_are_those_of_the_matrix = test_of(packed.packed_logits_are_those_of_the_matrix, NUMPY)
test_packed_experts_are_a_weighted_sum = test_of(packed.packed_experts_are_a_weighted_sum, NUMPY)


@pytest.mark.parametrize("name", [name for name in BENCHES if name in ("cpu-bfloat16", "torch-float32")])
def test_other_backends_compute_what_the_matrices_compute(name):
    """A few cases; the CUDA backend gets matrices in bfloat16, as in its tests."""
    (row,) = report(BENCHES[name](), ["packed"], Plan(examples=6))
    assert row.verdict == "pass", row.why


def swapped_halves(weight):
    """Read the odd column from the low half of a byte."""
    if weight.kind != "NVFP4":
        return weight
    return replace(weight, codes=weight.codes << 4 | weight.codes >> 4)


def forgotten(weight):
    return replace(weight, scale_2=np.float32(1)) if weight.kind == "NVFP4" and weight.scale_2 else weight


def one_block_later(weight):
    return replace(weight, scale=np.roll(weight.scale, 1, axis=-1)) if weight.scale.ndim else weight


def divided(weight):
    return replace(weight, scale=np.array(1 / weight.scale)) if weight.kind == "FP8" else weight


def codes_at_zero(weight):
    """Read the codes of a matrix of zeros as values; the format allows any codes there."""
    return replace(weight, scale_2=np.float32(1e-3)) if weight.scale_2 == 0 else weight


def misread(kind: type, wrong):
    """Return a backend that reads packed weights of a class by `wrong` when it places them."""

    def place(right, group, values):
        return right(group, [wrong(v) if isinstance(v, kind) else v for v in values])

    backend = numpy_backend(np.float32)
    return bench("mine", replace(backend, place=partial(place, backend.place)), "float32")


@pytest.mark.parametrize("wrong", [swapped_halves, forgotten, one_block_later, divided, codes_at_zero])
def test_a_wrong_reading_of_packed_weights_is_a_wrong_row(wrong):
    """A plain product is right."""
    linear, row = report(misread(Packed, wrong), ["linear", "packed"], Plan(examples=2))
    assert linear.verdict == "pass" and row.verdict == "wrong" and "off by" in row.why


@pytest.mark.parametrize("kind", FORMATS)
def test_a_wrong_reading_of_gguf_blocks_is_seen(kind):
    """The steps of another run of columns, no offset, or two columns in place of each other."""

    def slips(codes, step, offset):
        swapped = codes[..., [1, 0, *range(2, codes.shape[-1])]]
        yield swapped, step, offset
        yield codes, np.roll(step, 1, axis=-1 if step.shape[-1] > 1 else 0), offset
        if offset is not None:
            yield codes, step, np.zeros_like(offset)

    (given,) = (each for each in packed.EACH if each["kind"] == f"GGUF {kind}")
    right = FORMATS[kind].parts
    packed.a_packed_matrix_times_unit_vectors_is_the_matrix(NUMPY, **given)
    count = len(list(slips(*right(np.zeros((2, FORMATS[kind].nbytes), np.uint8)))))
    for i in range(count):
        wrong = replace(FORMATS[kind], parts=lambda blocks, i=i: list(slips(*right(blocks)))[i])
        backend = misread(Blocks, lambda weight, wrong=wrong: replace(weight, format=wrong))
        with pytest.raises(AssertionError, match="off by"):
            packed.a_packed_matrix_times_unit_vectors_is_the_matrix(backend, **given)


def test_functions_over_arrays_get_arrays():
    def linear(x, weight):
        assert isinstance(weight, (np.ndarray, tuple))
        return REFERENCE.linear(x, weight)

    first, row = report(with_functions({"linear": linear}), ["linear", "packed"], Plan(examples=4))
    assert first.verdict == row.verdict == "pass"


def test_four_over_six_leaves_a_block_at_6_where_4_is_as_close():
    """The only element that is not 0 is exact either way."""
    w = np.zeros((1, 32), np.float32)
    w[0, ::16] = 6
    packed_weight = nvfp4(w, four_over_six=True)
    assert (packed_weight.codes[0, ::8] & 15 == 7).all() and np.array_equal(packed_weight.dequantize(), w)

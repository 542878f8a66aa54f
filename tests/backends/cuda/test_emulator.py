"""The emulator finds planted faults that a GPU would not report."""

import re

import numpy as np
import pytest

from tests.support.cuda_device import needs_compiler
from tests.support.planted import MODES, X, found, run

pytestmark = needs_compiler


@MODES
def test_what_is_right_is_left_alone(mode):
    np.testing.assert_array_equal(run("good_barrier", mode), np.roll(X, -1))
    np.testing.assert_array_equal(run("good_warp", mode), X.reshape(32, 2)[:, ::-1].ravel())
    np.testing.assert_array_equal(run("own_element", mode, grid=(64,)), X)
    both = run("shared_in_each_block", mode, grid=(2,), room=128)
    np.testing.assert_array_equal(both, np.concatenate([X[::-1], X[::-1] + 1]))


def test_a_missing_barrier_gives_poison_and_is_a_race():
    assert np.isnan(run("missing_barrier")).any()
    report = found("missing_barrier", "thread")
    assert "data race" in report and "planted.cu:" in report


def test_a_missing_syncwarp_is_a_race():
    assert "data race" in found("missing_syncwarp", "thread")


def test_reading_past_an_array_gives_poison_and_is_reported_with_its_line():
    assert np.isnan(run("read_past_the_end")[63])
    report = found("read_past_the_end", "address")
    assert "heap-buffer-overflow" in report and "planted.cu:" in report


@pytest.mark.parametrize("kernel", ["write_past_the_end", "past_shared"])
def test_writing_past_an_array_is_reported(kernel):
    assert "outside" in found(kernel, "fast")
    assert "heap-buffer-overflow" in found(kernel, "address") or "out of bounds" in found(kernel, "address")


@pytest.mark.parametrize("mode, sentence", [("fast", "outside"), ("address", "heap-buffer-overflow")])
def test_more_shared_memory_than_was_declared_is_reported(mode, sentence):
    assert sentence in found("undeclared_shared", mode, shared=128)


@MODES
def test_what_nobody_wrote_is_poison(mode):
    assert np.isnan(run("unwritten_shared", mode)).tolist() == [False] * 63 + [True]
    assert np.isnan(run("unwritten_output", mode)).tolist() == [False] * 63 + [True]


def test_a_misaligned_vector_is_reported():
    assert "misaligned" in found("misaligned", "address")


def test_blocks_that_write_one_element_race():
    report = found("cross_block_race", "thread", grid=(3,))
    assert "data race" in report and "planted.cu:" in report


@MODES
@pytest.mark.parametrize(
    "kernel, sentence",
    {
        "divergent_barrier": "one barrier, two places",
        "early_exit": "thread (5,0,0) of block (0,0,0) ended before it",
        "barrier_and_shuffle": "neither can go on",
        "exit_before_shuffle": "in __shfl_xor_sync at planted.cu:.* for lane 9 of its warp, which has end",
        "not_in_mask": "is not in its own mask 0000ffff",
        "source_not_in_mask": "which the mask 0000ffff does not name",
        "different_masks": "with mask ffffffff for lane 31, thread .* with mask 80000001",
        "bad_width": "the width 12 in __shfl_down_sync",
        "bad_source": "shuffles from lane 8 of 8",
        "bad_distance": "shuffles by 32 lanes",
        "undeclared_shared": "the launch declared none",
        "too_much_static": "48 KB are the most",
        "bounded": "a block of 64 threads, and its launch bounds are 32",
    }.items(),
)
def test_a_broken_rule_is_one_sentence(kernel, sentence, mode):
    report = found(kernel, mode)
    assert re.search(sentence.replace("(", r"\(").replace(")", r"\)"), report), report
    assert report.startswith(f"kernel {kernel}: ") and "\n" not in report


@MODES
@pytest.mark.parametrize("kernel", ["wild_pointer", "divide_by_zero"])
def test_a_fatal_signal_is_an_error_and_not_the_end_of_the_process(kernel, mode):
    assert found(kernel, mode).startswith(f"kernel {kernel}: ")
    assert run("own_element", mode, grid=(64,)).tolist() == X.tolist()

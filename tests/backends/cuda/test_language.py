"""The emulator follows the CUDA manual, and refuses every launch that a device would refuse."""

import platform
import re

import numpy as np
import pytest

from refengine.spec.config import InputError
from tests.support.cuda_device import needs_compiler
from tests.support.planted import MODES, PLANTED, X, launched, run
from tools.cuda.emulator import EmulatedDevice

pytestmark = needs_compiler


@MODES
def test_lanes_of_a_warp_answer_as_the_manual_says(mode):
    i, lane = np.arange(64), np.arange(64) % 32
    warp, x = i - lane, X.astype(np.float64)
    expected = [
        x[warp + 3],
        x[i],
        x[np.where(lane >= 2, i - 2, i)],
        x[np.where(i % 8 >= 3, i - 3, i)],
        x[np.where(lane < 30, i + 2, i)],
        x[np.where(i % 16 < 13, i + 3, i)],
        x[warp + (lane ^ 5)],
        x[np.where((lane ^ 8) <= lane // 8 * 8 + 7, warp + (lane ^ 8), i)],
        [sum(1 << b for b in range(16) if (w + b) % 3 == 0) for w in warp],
        np.where(i < 32, 2, 1),
        x[warp + np.where(i % 2, 7, 6)],
        (warp + 31) * 2.0**33,
        np.full(64, 16 + 100),
    ]
    actual = run("warp_answers", mode, room=13 * 64)
    np.testing.assert_array_equal(actual, np.concatenate(expected).astype(np.float32))


@MODES
def test_atomics_count_every_thread_of_every_block_in_three_dimensions(mode):
    y = launched("count_all", grid=(2, 3, 2), block=(4, 2, 3), mode=mode, room=(4, "int32"))
    assert y.tolist() == [2 * 3 * 2 * 4 * 2 * 3, 1 + 20 + 100, 3 + 10 + 200, 5]


def order(seed):
    device = EmulatedDevice(seed, kernels=PLANTED)
    y = device.empty((64,), "int32")
    device.launch("planted", "who_comes_first", (1,), (64,), (y, device.zeros((1,), "int32")))
    return device.to_host(y).tolist()


def test_the_order_of_threads_is_random_and_repeats_with_its_seed():
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(64)) != order(1)


def test_scalars_arrive_whole():
    args = np.int32(-3), np.int64(2**40), np.uint64(2**41), np.float32(0.5)
    assert launched("scalars", *args)[0] == np.float32(-3 + 2.0**40 + 2.0**41 + 0.5)


ARGS = (np.int32(1), np.int64(1), np.uint64(1), np.float32(1))


@pytest.mark.parametrize(
    "args, sentence",
    [
        (ARGS[:3], "takes 5 arguments, and was given 4"),
        ((1, *ARGS[1:]), "argument a: np.int32 expected, not 1"),
        ((*ARGS[:3], np.float64(1)), "argument d: np.float32 expected"),
        ((*ARGS[:3], 1.0), "argument d: np.float32 expected"),
        ((np.int64(1), *ARGS[1:]), "argument a: np.int32 expected"),
        ((X, *ARGS[1:]), "argument a: np.int32 expected"),
    ],
)
def test_a_wrong_scalar_is_refused(args, sentence):
    with pytest.raises(TypeError, match=re.escape(sentence)):
        launched("scalars", *args)


def test_a_wrong_array_is_refused():
    device = EmulatedDevice(kernels=PLANTED)
    x, y = device.from_host(X), device.empty((64,), "float32")
    for wrong, sentence in [
        (device.from_host(X.astype(np.int32)), "argument x: float32 expected, not int32"),
        (X, "argument x: an array on the device expected, not ndarray"),
        (EmulatedDevice().from_host(X), "argument x: the array is on another device"),
        (np.int64(0), "argument x: an array on the device expected"),
    ]:
        with pytest.raises(TypeError, match=sentence):
            device.launch("planted", "own_element", (1,), (64,), (wrong, y))
    with pytest.raises(TypeError, match=r"planted\.cu has no kernel nobody; it has good_barrier"):
        device.launch("planted", "nobody", (1,), (64,), (x, y))


@pytest.mark.parametrize(
    "how, sentence",
    [
        (dict(block=(1025,)), "the block (1025,) is not within"),
        (dict(block=(32, 33)), "a block of 1056 threads"),
        (dict(block=(0,)), "the block"),
        (dict(grid=(1, 65536)), "the grid"),
        (dict(shared=164 << 10), "bytes of shared memory, and a block has at most"),
    ],
)
def test_a_launch_that_no_device_takes_is_refused(how, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        launched("own_element", X, **how)


def test_more_than_48_kb_must_be_and_can_be_declared():
    assert run("undeclared_shared", shared=100 << 10).tolist() == X.tolist()


def test_perturbed_mathematics_is_a_little_off_and_knows_no_denormals():
    device = EmulatedDevice(perturb=True, kernels=PLANTED)
    y = device.empty((128,), "float32")
    x = X / 16
    device.launch("planted", "approximate", (1,), (64,), (device.from_host(x), y))
    exponential, denormal = np.split(device.to_host(y), 2)
    error = np.abs(exponential / np.exp(x.astype(np.float64)) - 1) / 2.0**-23
    assert 1 < error.max() < 2 + 1.173 * x.max() + 1
    assert not denormal.any() or platform.machine() not in ("x86_64", "AMD64")
    assert np.float32(1e-39) * np.float32(1) > 0, "the process keeps its own rules"

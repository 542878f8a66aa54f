"""Random rounding of a float16 state on CUDA is unbiased, so small steps are not lost on average."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of that name)

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.backends.cuda.scan import FEW, Half, Scan
from refengine.spec.scan import ssd_scan
from tests.support.cuda_device import device, needs_compiler, on_address, sanitized
from tests.support.cuda_scans import drawn, scan, uncancelled
from tests.support.cuda_verbs import FLOAT32, exact, on_both, planted

HALF = replace(FLOAT32, defines=("STATE_F16",), half=2.0**-11)


LENGTH = st.sampled_from((1, 2, 20))  # of a call: a step, a few, a chunk


def added(verbs, S, amount, length=1, position=0):
    """Return S + amount, added at a position by a scan without decay."""
    device, (b, h, p, n) = verbs.device, S.shape
    x, dt = np.zeros((b, length, h, p), np.float32), np.zeros((b, length, h), np.float32)
    x[:, 0] = amount
    B = np.ones((b, length, 1, n), np.float32)
    still, zeros = np.full(h, -1e4, np.float32), np.zeros(h, np.float32)
    here = [device.from_host(a) for a in (x, dt, still, B, B, zeros, zeros)]
    key, read = (device.from_host(np.full(b, a, np.int32)) for a in (1234, position))
    after = verbs.ssd_scan(*here, Half(S, key, read), None, (1.0, 1.0))[1]
    assert (device.to_host(read) == position + length).all()
    return after


def state(device, value, shape):
    return device.from_host(np.full(shape, value, np.float16))


@given(
    share=st.sampled_from((0.0625, 0.3, 0.5, 0.9)),
    start=st.sampled_from((1.0, -3.0, 0.0, 2.0**-15)),
    shape=st.sampled_from(((1, 2, 64, 128), (2, 3, 41, 33))),
    length=LENGTH,
)
def test_rounding_goes_up_as_often_as_the_value_is_near(device, share, start, shape, length):
    """Frequencies are within four standard deviations, and neighbouring elements are independent."""
    unit = max(2.0**-24, 2.0 ** np.floor(np.log2(max(abs(start), 2.0**-24))) * 2.0**-10)
    after = added(Scan(device, HALF.defines), state(device, start, shape), share * unit, length)
    up = (device.to_host(after).astype(np.float64) - start) / unit
    assert set(np.unique(up)) <= {0.0, 1.0}, "one of the two values next to it"
    sigma = (share * (1 - share) / up.size) ** 0.5
    assert abs(up.mean() - share) < 4 * sigma
    rest = up.reshape(-1) - share
    for lag in (1, 2, 3, 4, shape[-1], shape[-1] + 1, 2 * shape[-1], shape[-1] * shape[-2]):
        assert abs(np.mean(rest[lag:] * rest[:-lag])) < 5 * share * (1 - share) / up.size**0.5, lag


def test_many_steps_too_small_for_float16_add_up(device):
    verbs, S = Scan(device, HALF.defines), state(device, 1.0, (1, 1, 32, 64))
    for position in range(50):
        S = added(verbs, S, 0.2 * 2.0**-10, position=position)
    steps = (device.to_host(S).astype(np.float64) - 1) * 2**10
    assert abs(steps.mean() - 10) < 4 * (50 * 0.2 * 0.8 / steps.size) ** 0.5
    assert 2 < steps.std() < 4, "each call rounds anew"


def test_what_float16_can_hold_stays_and_the_largest_is_the_limit(device):
    values = np.array([0, 1, -2.5, 2.0**-24, -65504, 65504, 2.0**-14, 1000], np.float16)
    verbs = Scan(device, HALF.defines)
    for length in (1, 3, 20):
        S = added(verbs, device.from_host(values.reshape(1, 1, 1, -1)), 0.0, length)
        assert np.array_equal(device.to_host(S).ravel(), values)
        S = added(verbs, S, 1e6, length)
        assert (device.to_host(S) == 65504).all()


@on_both
@given(seed=st.integers(0, 999), length=st.sampled_from((1, 5, 40)), sizes=st.sampled_from(((5, 7), (8, 16))))
def test_a_float16_state_is_the_recurrence_to_float16(device, build, seed, length, sizes):
    arrays = [*drawn(build, seed, 2, length, (1, 2), sizes)]
    arrays[-1] = arrays[-1].astype(np.float16)
    half = replace(build, defines=(*build.defines, "STATE_F16"))
    y, after = (device.to_host(a) for a in scan(device, half, arrays))
    expected, S = ssd_scan(*exact(*arrays))
    whole, whole_S = uncancelled(arrays)
    assert after.dtype == np.float16
    build.near(y, expected, whole, length > FEW)
    coarse = replace(build, half=max(2.0**-10, build.half))  # a whole unit of float16
    coarse.near(after, S, whole_S)


@on_address  # no other test of the default tier rounds at random under a sanitizer
def test_random_rounding_is_clean_under_the_sanitizers(sanitized):
    for length in (2, 20):
        arrays = [*drawn(HALF, 3, 2, length, (1, 2), (5, 8))]
        arrays[-1] = arrays[-1].astype(np.float16)
        _, after = scan(sanitized, HALF, arrays)
        _, expected = ssd_scan(*exact(*arrays))
        np.testing.assert_allclose(sanitized.to_host(after), expected, atol=0.1)


FAULTS = {
    "to nearest": ("return f16_bits(copysignf(fminf(size, 65504.0f), x));", "return f16_bits(x);"),
    "a position like the one before": ("mix((position ^ key) + 0x9e3779b9u)", "mix(key + 0x9e3779b9u)"),
    "one number for two": ("mix(mix(element ^ step) + step)", "mix(mix(element / 2 ^ step) + step)"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    broken = planted(tmp_path, "rounding.cuh", *FAULTS[fault])
    with pytest.raises(AssertionError):
        test_many_steps_too_small_for_float16_add_up(broken)
        test_rounding_goes_up_as_often_as_the_value_is_near.hypothesis.inner_test(
            broken, 0.3, 1.0, (1, 2, 64, 128), 1
        )

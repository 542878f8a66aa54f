"""The norms of the CUDA backend agree with the definition, at any width and stride."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of that name)

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.backends.cuda import layers
from refengine.backends.cuda.layers import Layers
from refengine.spec.norm import gated_rms_norm, rms_norm
from tests.support.cuda_device import device, needs_compiler, perturbed, sanitized
from tests.support.cuda_verbs import FLOAT32, build_for, constants, exact, on_both, planted, small, within

SEED = st.integers(0, 9999)
WIDTH = st.integers(1, 70) | st.sampled_from((8, 16, 64, 256, 520))
AROUND = st.sampled_from(((0, 0), (8, 16), (3, 1)))  # columns before and after, in a wider array


def norms(device, build, seed, b, l, groups, width, around=(0, 0), fresh=False):
    """Check both norms of one case against the definition, on values that an activation can hold."""
    verbs, c = Layers(device, build.defines), groups * width
    x, delta, w = build.values(seed, b, l, c), build.values(seed + 1, b, l, c), small(seed, c)
    x_here, delta_here, w_here = device.from_host(x), within(device, delta, *around), device.from_host(w)
    y, total = verbs.rms_norm(x_here, None if fresh else delta_here, w_here, 1e-5)
    expected = x if fresh else (x.astype(np.float32) + delta.astype(np.float32)).astype(build.dtype)
    total = device.to_host(total)
    assert np.array_equal(total, expected), "x + delta, rounded to an activation"
    build.near(device.to_host(y), rms_norm(*exact(total), None, *exact(w), 1e-5)[0], what="rms_norm")
    y = verbs.gated_rms_norm(x_here, delta_here, w_here, 1e-5, groups)
    build.near(device.to_host(y), gated_rms_norm(*exact(x, delta, w), 1e-5, groups), what="gated_rms_norm")


@on_both
@given(
    seed=SEED,
    b=st.integers(1, 3),
    l=st.integers(1, 5),
    groups=st.integers(1, 4),
    width=WIDTH,
    around=AROUND,
    fresh=st.booleans(),
)
@example(seed=0, b=1, l=1, groups=2, width=4200, around=(0, 0), fresh=False)  # more than a thread keeps
def test_the_norm_reads_the_rounded_sum_and_the_gate_comes_first(
    device, build, seed, b, l, groups, width, around, fresh
):
    norms(device, build, seed, b, l, groups, width, around, fresh)


@on_both
@given(seed=SEED, l=st.integers(1, 4), groups=st.integers(1, 3), width=WIDTH)
def test_ranks_that_share_a_group_normalise_it_as_one(device, build, seed, l, groups, width):
    """Each rank has half of every group, and both get the mean of all squares."""
    verbs, c = Layers(device, build.defines), 2 * groups * width
    y, z, w = build.values(seed, 2, l, c), build.values(seed + 1, 2, l, c), small(seed, c)
    halves = [
        [a.reshape(*a.shape[:-1], groups, 2, width)[..., i, :].reshape(*a.shape[:-1], -1) for a in (y, z, w)]
        for i in (0, 1)
    ]
    known = []

    def tell(squares):
        known.append(device.to_host(squares))
        return squares

    for half in halves:
        verbs.gated_rms_norm(*map(device.from_host, half), 1e-5, groups, mean=tell)
    both = device.from_host((known[0] + known[1]) / 2)
    assert both.shape == (2, l, groups, 1)
    parts = [
        device.to_host(verbs.gated_rms_norm(*map(device.from_host, half), 1e-5, groups, mean=lambda _: both))
        for half in halves
    ]
    whole = np.stack([part.reshape(2, l, groups, width) for part in parts], axis=3).reshape(2, l, c)
    build.near(whole, gated_rms_norm(*exact(y, z, w), 1e-5, groups))


@needs_compiler
@on_both
def test_the_order_of_threads_changes_no_bit(build):
    from tools.cuda.emulator import EmulatedDevice

    bits = set()
    x, z, w = build.values(1, 3, 5, 528), build.values(2, 3, 5, 528), small(3, 528)
    for seed in (1, 2):
        device = EmulatedDevice(seed)
        here, verbs = [device.from_host(a) for a in (x, z, w)], Layers(device, build.defines)
        results = verbs.rms_norm(*here, 1e-5)[0], verbs.gated_rms_norm(*here, 1e-5, 2)
        bits.add(tuple(device.to_host(a).tobytes() for a in results))
    assert len(bits) == 1


def test_the_norms_are_clean_under_the_sanitizers(sanitized):
    build = build_for(sanitized)
    norms(sanitized, build, 5, 1, 2, 2, 264, around=(8, 0))  # several warps
    norms(sanitized, build, 5, 1, 1, 3, 37, around=(0, 1))


def test_the_norms_bear_approximate_mathematics(perturbed):
    norms(perturbed, FLOAT32, 5, 2, 3, 2, 48)


FAULTS = {
    "the gate is plain": ("gated_rms_norm.cu", "u[i] *= silu(gates[i]);", "u[i] *= gates[i];"),
    "only one warp counts": ("rms_norm.cu", "block_sum(squares, partial)", "warp_sum(squares)"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    broken = planted(tmp_path, *FAULTS[fault])
    with pytest.raises(AssertionError):
        norms(broken, FLOAT32, 5, 2, 3, 1, 260)


def test_the_limits_in_python_are_those_of_the_kernels():
    known = constants("causal_conv.cu") | constants("router.cu") | constants("route.cu")
    names = {"EXPERTS": "CHOICES"}
    for name in ("TAPS", "SPAN", "FEW", "TOKENS", "COLUMNS", "EXPERTS"):
        assert getattr(layers, name) == known[names.get(name, name)], name

"""The convolution of the CUDA backend reads real positions only, and its tail continues the call before."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of that name)

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.backends.cuda.layers import Layers
from refengine.spec.config import InputError
from refengine.spec.conv import causal_conv
from tests.support.cuda_device import device, needs_compiler, perturbed, sanitized
from tests.support.cuda_verbs import (
    FLOAT32,
    build_for,
    exact,
    lengths,
    on_both,
    planted,
    poisoned,
    small,
    within,
)

SEED = st.integers(0, 9999)
WIDTH = st.integers(1, 70) | st.sampled_from((8, 16, 64, 256, 520))
AROUND = st.sampled_from(((0, 0), (8, 16), (3, 1)))  # columns before and after, in a wider array


def convolved(device, build, seed, b, l, c, k, around=(0, 0), ragged=True):
    """Compare one call with the definition; padding is NaN."""
    x, tail, n = build.values(seed, b, l, c), build.values(seed + 1, b, k - 1, c), lengths(seed, b, l)
    w, bias = small(seed, c, 1, k), small(seed, c)
    given_x = within(device, poisoned(x, n) if ragged else x, *around)
    n_here = device.from_host(n) if ragged else None
    args = (device.from_host(a) for a in (w, bias, tail))
    y, after = Layers(device, build.defines).causal_conv(given_x, *args, n_here)
    expected, left = causal_conv(*exact(x, w, bias, tail), n if ragged else None)
    assert np.array_equal(device.to_host(after), left.astype(build.dtype)), "the tail"
    for row, end in enumerate(n if ragged else [l] * b):
        build.near(device.to_host(y)[row, :end], expected[row, :end], what=f"row {row}")


@on_both
@given(
    seed=SEED,
    b=st.integers(1, 3),
    l=st.integers(1, 50),
    c=WIDTH,
    k=st.integers(2, 4),
    around=AROUND,
    ragged=st.booleans(),
)
@example(seed=1, b=3, l=1, c=200, k=4, around=(8, 0), ragged=True)
def test_the_convolution_and_its_tail_see_real_positions_only(
    device, build, seed, b, l, c, k, around, ragged
):
    convolved(device, build, seed, b, l, c, k, around, ragged)


@on_both
@given(seed=SEED, c=WIDTH, k=st.integers(2, 4), pieces=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_a_convolution_in_pieces_is_the_convolution(device, build, seed, c, k, pieces):
    verbs, l = Layers(device, build.defines), sum(pieces)
    x, tail = build.values(seed, 2, l, c), build.values(seed + 1, 2, k - 1, c)
    w, bias = device.from_host(small(seed, c, 1, k)), device.from_host(small(seed, c))
    whole, left = verbs.causal_conv(device.from_host(x), w, bias, device.from_host(tail))
    tail, parts = device.from_host(tail), []
    for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
        y, tail = verbs.causal_conv(device.from_host(piece), w, bias, tail)
        parts.append(device.to_host(y))
    assert np.array_equal(np.concatenate(parts, axis=1), device.to_host(whole))
    assert np.array_equal(device.to_host(tail), device.to_host(left))


def test_the_convolution_is_clean_under_the_sanitizers(sanitized):
    for c in (48, 37):
        for l in (1, 19):
            convolved(sanitized, build_for(sanitized), 6, 2, l, c, 4, around=(8, 0))


def test_the_convolution_bears_approximate_mathematics(perturbed):
    convolved(perturbed, FLOAT32, 6, 2, 19, 48, 4)


FAULTS = {
    "the current token meets the first tap": ("int tap = j - (TAPS - k);", "int tap = TAPS - 1 - j;"),
    "the tail is what the call ends with": ("n ? min(n[b], l) : l", "l"),
    "what was read ahead is forgotten": ("window[j][i] = window[AHEAD + j][i]", "window[j][i] = 0"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    broken = planted(tmp_path, "causal_conv.cu", *FAULTS[fault])
    with pytest.raises(AssertionError):
        convolved(broken, FLOAT32, 1, 3, 19, 48, 4)


@needs_compiler
def test_a_wider_convolution_than_the_kernel_has_is_refused_in_a_sentence(device):
    x = device.zeros((1, 3, 8), "float32")
    weight, bias, tail = (device.zeros(s, "float32") for s in ((8, 1, 6), (8,), (1, 5, 8)))
    with pytest.raises(InputError, match="a conv_kernel of at most 4, not 6"):
        Layers(device).causal_conv(x, weight, bias, tail)

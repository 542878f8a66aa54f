"""The scan of the CUDA backend agrees with the recurrence, by steps and by chunks, with a float32 state."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of that name)

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.backends.cuda import scan as module
from refengine.backends.cuda.scan import FEW
from refengine.spec.scan import ssd_scan
from tests.support.cuda_device import device, needs_compiler, perturbed, sanitized
from tests.support.cuda_scans import check, drawn, scan, stays, uncancelled
from tests.support.cuda_verbs import (
    FLOAT32,
    build_for,
    constants,
    exact,
    lengths,
    on_both,
    planted,
    poisoned,
    small,
    within,
)
from tools.cuda.emulator import EmulatedDevice

SEED = st.integers(0, 9999)
GROUPS = st.sampled_from(((1, 1), (2, 1), (1, 3), (2, 2)))  # groups, heads in each
SIZES = st.sampled_from(((5, 7), (8, 16), (64, 128), (16, 36), (70, 9), (1, 130)))  # p, n
AROUND = st.sampled_from(((0, 0), (8, 8), (1, 2)))  # columns before and after, in a wider array
LIMIT = st.sampled_from(((0.01, 0.2), (0.0, 0.05), (0.5, math.inf)))


@on_both
@given(
    seed=SEED,
    b=st.integers(1, 3),
    l=st.just(1) | st.integers(1, FEW),
    groups=GROUPS,
    sizes=SIZES,
    around=AROUND,
    ragged=st.booleans(),
)
def test_a_few_steps_are_the_recurrence(device, build, seed, b, l, groups, sizes, around, ragged):
    arrays = drawn(build, seed, b, l, groups, sizes)
    check(device, build, arrays, lengths(seed, b, l) if ragged else None, around=around)


@on_both
@given(seed=SEED, l=st.integers(1, FEW + 2), groups=GROUPS, sizes=SIZES, around=AROUND)
@example(seed=0, l=4, groups=(1, 3), sizes=(64, 128), around=(0, 0))
@example(seed=0, l=4, groups=(1, 3), sizes=(5, 36), around=(1, 2))
@example(seed=0, l=2, groups=(2, 2), sizes=(5, 260), around=(0, 0))
def test_a_readonly_state_stays_and_changes_no_output(device, build, seed, l, groups, sizes, around):
    stays(device, build, drawn(build, seed, 2, l, groups, sizes), lengths(seed, 2, l), around)


@on_both
@given(
    seed=SEED,
    b=st.integers(1, 2),
    l=st.integers(FEW + 1, 150),
    groups=GROUPS,
    sizes=SIZES,
    around=AROUND,
    ragged=st.booleans(),
)
@example(seed=1, b=1, l=257, groups=(1, 1), sizes=(64, 128), around=(0, 0), ragged=False)
@example(seed=2, b=3, l=128, groups=(2, 1), sizes=(16, 16), around=(0, 0), ragged=True)
def test_chunks_are_the_recurrence(device, build, seed, b, l, groups, sizes, around, ragged):
    arrays = drawn(build, seed, b, l, groups, sizes)
    check(device, build, arrays, lengths(seed, b, l) if ragged else None, around=around)


@on_both
@given(seed=SEED, pieces=st.lists(st.sampled_from((1, 1, 2, 30, 64, 128, 140)), min_size=2, max_size=4))
def test_a_scan_in_pieces_is_the_scan(device, build, seed, pieces):
    arrays = drawn(build, seed, 2, sum(pieces), (2, 1), (6, 16))
    x, dt, A_log, B, C, D, bias, S = arrays
    expected, state = ssd_scan(*exact(*arrays))
    whole, whole_state = uncancelled(arrays)
    here, first, parts = device.from_host(S), 0, []
    for length in pieces:
        px, pdt, pB, pC = (a[:, first : first + length] for a in (x, dt, B, C))
        y, here = scan(device, build, (px, pdt, A_log, pB, pC, D, bias, S), S=here)
        parts.append(device.to_host(y))
        first += length
    build.near(np.concatenate(parts, axis=1), expected, whole, True)
    FLOAT32.near(device.to_host(here), state, whole_state)


@on_both
@given(seed=SEED, l=st.sampled_from((1, 70)), limit=LIMIT)
def test_dt_is_clamped_to_the_limit_and_to_nothing_else(device, build, seed, l, limit):
    arrays = drawn(build, seed, 1, l, (1, 2), (8, 16))
    check(device, build, arrays, limit=limit)
    small_steps = (*arrays[:6], arrays[6] - 12, arrays[7])
    check(device, build, small_steps)


@on_both
@given(seed=SEED, l=st.sampled_from((3, 130, 200)), faster=st.sampled_from((3, 20, 200)))
def test_a_fast_decay_forgets_and_does_not_overflow(device, build, seed, l, faster):
    """Differences of the sum of dt A are accurate even if the sum is -30000."""
    x, dt, A_log, B, C, D, bias, S = drawn(build, seed, 1, l, (1, 2), (8, 16))
    bias = np.full_like(bias, faster)
    for slower in (0, np.log(np.float32(faster))):
        check(device, build, (x, dt, A_log - slower, B, C, D, bias, S))


@on_both
def test_chunks_that_take_turns_are_the_scan(device, build, monkeypatch):
    """If the states between chunks need too much memory, a call computes a few chunks at a time."""
    arrays = drawn(build, 4, 2, 400, (1, 2), (5, 12))
    monkeypatch.setattr(module, "SCRATCH", 1)
    check(device, build, arrays)
    check(device, build, arrays, np.array([140, 399], np.int32))


@needs_compiler
@on_both
def test_a_wide_state_fits_where_there_is_least_shared_memory(build):
    arrays = drawn(build, 3, 1, 65, (2, 1), (80, 300))
    check(EmulatedDevice(arch="sm_120"), build, arrays, around=(8, 0))


@needs_compiler
@on_both
def test_the_order_of_threads_changes_no_bit(build):
    for l in (1, 150):
        arrays, bits = drawn(build, 3, 2, l, (1, 2), (8, 40)), set()
        for seed in (1, 2):
            device = EmulatedDevice(seed)
            bits.add(tuple(device.to_host(a).tobytes() for a in scan(device, build, arrays)))
        assert len(bits) == 1


def test_the_scan_is_clean_under_the_sanitizers(sanitized):
    build = build_for(sanitized)
    for l, groups, sizes, n in (
        (2, (2, 1), (5, 37), [1, 0]),
        (3, (1, 2), (8, 16), None),
        (70, (1, 2), (8, 40), [70, 33]),
        (130, (1, 1), (5, 7), None),
    ):
        arrays = drawn(build, l, 2, l, groups, sizes)
        check(sanitized, build, arrays, None if n is None else np.array(n, np.int32))


def test_the_scan_bears_approximate_mathematics(perturbed):
    check(perturbed, FLOAT32, drawn(FLOAT32, 1, 1, 1, (1, 2), (8, 16)))
    check(perturbed, FLOAT32, drawn(FLOAT32, 1, 1, 150, (1, 2), (8, 40)))


FAULTS = {
    "a position does not see itself": ("ssd_outputs.cu", "return j <= i ?", "return j < i ?"),
    "the scores are those of another pair": ("ssd_scores.cu", "(pair + 1) / 2 * TILE", "pair / 2 * TILE"),
    "the state decays to the wrong end": ("ssd_states.cu", "expf((float)(steps.end - a))", "expf((float)a)"),
    "the sum of steps stays in a warp": ("ssd_states.cu", "x += total[i];", "x += 0;"),
    "the chunks forget": ("ssd_pass.cu", "float factor = decay[first + c];", "float factor = 1.0f;"),
    "a step decays after it adds": (
        "ssd_step.cu",
        "decay * s[r][e] + step * x[r] * b[e]",
        "decay * (s[r][e] + step * x[r] * b[e])",
    ),
    "a step begins where the call began": ("ssd_step.cu", "(t == 0 || !kept)", "true"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    broken = planted(tmp_path, *FAULTS[fault])
    length = 3 if fault.startswith("a step") else 140
    with pytest.raises(AssertionError):
        check(broken, FLOAT32, drawn(FLOAT32, 1, 1, length, (1, 1), (8, 16)))


@needs_compiler
def test_a_readonly_state_that_is_written_is_seen(tmp_path):
    broken = planted(tmp_path, "ssd_step.cu", "(t < count - 1 || stays)", "t < count - 1")
    with pytest.raises(AssertionError):
        stays(broken, FLOAT32, drawn(FLOAT32, 1, 2, 3, (1, 1), (8, 16)), np.array([3, 2], np.int32))


def test_the_sizes_in_python_are_those_of_the_kernels():
    known = constants("ssd.cuh") | constants("ssd_step.cu")
    assert 4 * known.pop("ROWS") == module.STEP_ROWS
    for name in ("CHUNK", "TILE", "THREADS", "PAIRS"):
        assert known[name] == getattr(module, name)

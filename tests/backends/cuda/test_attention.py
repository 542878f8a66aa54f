"""Attention on CUDA agrees with the definition, in pieces of any size."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.backends.cuda import attention as cuda
from refengine.backends.cuda.attention import Attention
from refengine.spec.config import InputError
from tests.support.cuda_attention import Case
from tests.support.cuda_device import device, needs_compiler, perturbed, sanitized  # noqa: F401
from tests.support.cuda_tiles import sizes
from tests.support.cuda_verbs import FLOAT32, on_both, planted
from tools.cuda.emulator import EmulationError

SEED = st.integers(0, 9999)
PIECES = st.lists(st.sampled_from((1, 1, 2, 5, 30)) | st.integers(1, 45), min_size=1, max_size=5)


@on_both
@given(
    seed=SEED,
    b=st.integers(1, 3),
    kv=st.integers(1, 3),
    r=st.sampled_from((1, 2, 3, 5, 16)),
    e=st.integers(1, 40) | st.sampled_from((64, 72)),
    pieces=PIECES,
    ragged=st.booleans(),
)
@example(seed=0, b=1, kv=2, r=16, e=128, pieces=[70, 1, 9, 4], ragged=False)
@example(seed=1, b=3, kv=1, r=5, e=66, pieces=[45, 40, 1], ragged=True)
@example(seed=2, b=1, kv=1, r=32, e=128, pieces=[70, 1, 5, 1, 20], ragged=True)
def test_attention_in_pieces_is_the_definition(device, build, seed, b, kv, r, e, pieces, ragged):  # noqa: F811
    """Padding, and cache positions beyond the length, are NaN."""
    Case(build, seed, b, kv, r, e, pieces).check(device, ragged)


@on_both
@pytest.mark.parametrize("pieces", [(30,), (30, 1)])
def test_what_order_threads_run_in_does_not_show(device, build, pieces):  # noqa: F811
    case = Case(build, 1, b=1, r=16, e=24, pieces=pieces)
    (one, _), (other, _) = case.check(device), case.check(device)
    for part in ("k", "v"):
        one_part, other_part = (getattr(cache, part)[:, :, : sum(pieces)] for cache in (one, other))
        assert np.array_equal(device.to_host(one_part), device.to_host(other_part))
    verb = Attention(device, build.defines)
    ys = [device.to_host(verb.attention(*case.heads(device.from_host(case.qkv)), c)[0]) for c in (one, other)]
    assert np.array_equal(*ys)


@on_both
def test_very_large_scores_do_not_overflow(device, build):  # noqa: F811
    case = Case(build, 2, e=24, pieces=(30, 3), scale=1e4)
    cache, _ = case.caches(device)
    for begin, end in pairwise(case.ends):
        given_here = case.heads(device.from_host(np.ascontiguousarray(case.qkv[:, begin:end])))
        y, cache = Attention(device, build.defines).attention(*given_here, cache)
        assert np.isfinite(device.to_host(y).astype(np.float32)).all()


@on_both
@pytest.mark.parametrize("blocks", [1, 8, 30])
def test_into_how_many_parts_a_context_is_cut_does_not_matter(device, build, blocks, monkeypatch):  # noqa: F811
    """One part of many tiles, several parts of a few tiles, and empty parts."""
    monkeypatch.setattr(cuda, "BLOCKS", blocks)
    Case(build, 4, b=1, kv=2, r=2, e=16, pieces=(300, 1, 3)).check(device)


@on_both
@pytest.mark.parametrize("e", [40, 13])
def test_attention_is_clean_under_the_sanitizers(sanitized, build, e, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda, "BLOCKS", 2)
    Case(build, 1, b=2, kv=1, r=2, e=e, pieces=(150, 2)).check(sanitized)
    Case(build, 1, b=1, kv=3, r=1, e=e, pieces=(5, 2, 1)).check(sanitized, ragged=True)


@on_both
def test_attention_bears_approximate_mathematics(perturbed, build):  # noqa: F811
    Case(build, 1, r=4, e=40, pieces=(40, 2)).check(perturbed, ragged=True)


WAIT = "copies.wait<0>();\n        __syncthreads();"
FAULTS = {
    "a query sees the next key": ("attention.cu", "(first + i) / r + 1, end)", "(first + i) / r + 2, end)"),
    "no wait for a stage": ("attention.cu", WAIT, "__syncthreads();"),
    "a stage is fetched before all have done with it": (
        "attention.cu",
        WAIT,
        f"copies.wait<0>();\n        fetch_stage(stage + 1);\n{WAIT}",
    ),
    "what was summed is not scaled down": (
        "attention.cuh",
        "rows.out[c][i][half] *= keep;",
        "rows.out[c][i][half] *= 1.0f;",
    ),
    "a warp's keys count as the first": ("attention_decode.cu", "* KEYS + warp * TURN;", "* KEYS;"),
    "parts count alike": ("attention_decode.cu", "counts = share(scale[0], top);", "counts = 1.0f;"),
    "padding counts": ("attention.cu", "length[b] += added(n, b, l);", "length[b] += l;"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    broken = planted(tmp_path, *FAULTS[fault])
    with pytest.raises(AssertionError):
        Case(FLOAT32, 3, r=4, e=20, pieces=(70, 40, 1, 1)).check(broken, ragged=True)


@needs_compiler
def test_a_block_that_ends_before_its_copies_is_seen(tmp_path):
    """A block without keys must wait for the queries that it fetched."""
    broken = planted(tmp_path, "attention_decode.cu", "copies.wait<0>();  // for the queries", "//")
    with pytest.raises(EmulationError, match="of its copies were under way"):
        Case(FLOAT32, 3, e=24, pieces=(70, 1)).check(broken)


@on_both
def test_the_sizes_in_python_are_those_of_the_kernels(build):
    size, many, few = build.dtype.itemsize, sizes("attention.cu", build), sizes("attention_decode.cu", build)
    assert (16 * many["M"] * many["WARPS"], many["KEYS"]) == cuda.MANY[size]
    assert (few["QUERIES"], few["TURN"] * few["WARPS"]) == cuda.FEW[size]
    assert many["WARPS"] == few["WARPS"] == 4, "blocks of 128 threads"
    assert sizes("keys.cuh", build)["HEAD"] == cuda.HEAD


@needs_compiler
def test_a_larger_head_than_the_kernels_hold_is_refused_in_a_sentence(device):  # noqa: F811
    with pytest.raises(InputError, match="head_dim of at most 128, not 130"):
        Case(FLOAT32, 0, e=130).check(device)

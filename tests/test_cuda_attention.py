"""Attention on CUDA is the definition's, in pieces of any size; its cache can be forked and captured."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends.cuda import attention as cuda
from backends.cuda.attention import Attention, Cache
from spec.attention import attention
from spec.config import InputError
from spec.state import Cache as Definition
from tests.cuda_device import device, needs_compiler, perturbed, sanitized  # noqa: F401
from tests.cuda_tiles import sizes
from tests.cuda_verbs import FLOAT32, exact, lengths, on_both, planted, poisoned

SEED = st.integers(0, 9999)
PIECES = st.lists(st.sampled_from((1, 1, 2, 5, 30)) | st.integers(1, 45), min_size=1, max_size=5)


class Case:
    """Queries, keys and values of `sum(pieces)` positions, side by side as the projection leaves them."""

    def __init__(self, build, seed, b=2, kv=2, r=3, e=10, pieces=(5, 1), scale=1.0):
        self.build, self.seed, self.b, self.kv, self.r, self.e = build, seed, b, kv, r, e
        self.ends, self.widths = np.cumsum([0, *pieces]), np.cumsum([0, kv * r * e, kv * e, kv * e])
        self.qkv = build.values(seed, b, self.ends[-1], self.widths[-1])
        self.qkv[..., : self.widths[2]] *= np.array(scale, build.dtype)

    def caches(self, device):  # noqa: F811
        cfg = SimpleNamespace(num_key_value_heads=self.kv, head_dim=self.e)
        k, v = (np.zeros((self.b, 0, self.kv, self.e)) for _ in "kv")
        length = np.zeros(self.b, np.int64)
        return Cache.empty(cfg, self.b, self.build.name, device), Definition(k, v, length, length.copy())

    def heads(self, qkv):
        """q b l h e, k and v b l kv e, of an array on either side."""
        parts = (qkv[..., begin:end] for begin, end in pairwise(self.widths))
        return [part.reshape(*part.shape[:2], part.shape[-1] // self.e, self.e) for part in parts]

    def step(self, device, caches, qkv, n=None):  # noqa: F811
        """One call on both sides; what is returned at padding means nothing."""
        here, known = caches
        given = device.from_host(qkv if n is None else poisoned(qkv, n))
        n_here = None if n is None else device.from_host(n)
        y, here = Attention(device, self.build.defines).attention(*self.heads(given), here, n_here)
        q, k, v = exact(*self.heads(qkv))
        apart = Definition(known.k.copy(), np.abs(known.v), known.length, known.length.copy())
        whole, _ = attention(q, k, np.abs(v), apart, n)
        expected, known = attention(q, k, v, known, n)
        y = device.to_host(y)
        for row, end in enumerate(n if n is not None else [qkv.shape[1]] * self.b):
            self.build.near(y[row, :end], expected[row, :end], whole[row, :end], True, f"row {row}")
        assert np.array_equal(device.to_host(here.length), known.length)
        return here, known

    def check(self, device, ragged=False):  # noqa: F811
        caches = self.caches(device)
        for i, (begin, end) in enumerate(pairwise(self.ends)):
            n = lengths(self.seed + i, self.b, end - begin) if ragged else None
            caches = self.step(device, caches, self.qkv[:, begin:end], n)
        return caches


@on_both
@given(seed=SEED, b=st.integers(1, 3), kv=st.integers(1, 3), r=st.sampled_from((1, 2, 3, 5, 16)),
       e=st.integers(1, 40) | st.sampled_from((64, 72)), pieces=PIECES, ragged=st.booleans())  # fmt: skip
@example(seed=0, b=1, kv=2, r=16, e=128, pieces=[70, 1, 9, 4], ragged=False)
@example(seed=1, b=3, kv=1, r=5, e=66, pieces=[45, 40, 1], ragged=True)
@example(seed=2, b=1, kv=1, r=32, e=128, pieces=[70, 1, 5, 1, 20], ragged=True)
def test_attention_in_pieces_is_the_definition(device, build, seed, b, kv, r, e, pieces, ragged):  # noqa: F811
    """Padding is not a number, and neither is what a cache holds beyond its length."""
    Case(build, seed, b, kv, r, e, pieces).check(device, ragged)


@on_both
@given(seed=SEED, pieces=st.sampled_from(((1,), (30,), (4, 1), (40, 12))), twice=st.booleans())
def test_forks_and_slots_of_a_cache_do_not_see_each_other(device, build, seed, pieces, twice):  # noqa: F811
    """Both go on from the same buffer, one of them twice in a row; then their rows change places."""
    case, more = Case(build, seed, pieces=pieces), Case(build, seed + 1, pieces=(1, 2, 3))
    here, known = case.check(device, ragged=True)
    one, other = (here, known.fork()), (here.fork(), known.fork())
    one = case.step(device, one, more.qkv[:, :1])
    if twice:
        one = case.step(device, one, more.qkv[:, 1:3])
    other = case.step(device, other, more.qkv[:, 3:])
    mixed = [a.put([0], b.take([1])) for a, b in zip(one, other, strict=True)]
    case.step(device, mixed, more.qkv[:, :2])
    case.step(device, one, more.qkv[:, 3:5])


class Recorder:
    """A device that can repeat what was launched, as a captured graph does: the same arguments again."""

    def __init__(self, device):  # noqa: F811
        self.device, self.launches = device, []

    def __getattr__(self, name):
        return getattr(self.device, name)

    def launch(self, *how):
        self.launches.append(how)
        self.device.launch(*how)

    def replay(self):
        for how in self.launches:
            self.device.launch(*how)


@on_both
def test_a_captured_step_finds_the_next_position_by_itself(device, build):  # noqa: F811
    case = Case(build, 0, r=4, e=32, pieces=(6, *[1] * 9))
    here, known = case.step(device, case.caches(device), case.qkv[:, :6], np.array([6, 2], np.int32))
    static, recorder = device.from_host(case.qkv[:, :1]), Recorder(device)
    for i in range(6, 15):
        device.copy(device.from_host(np.ascontiguousarray(case.qkv[:, i : i + 1])), static)
        reserved = here.reserve(1)
        if recorder.launches:
            assert reserved is here, "there is room, so nothing has moved"
            recorder.replay()
            here = here.advanced(1)
        else:
            y, here = Attention(recorder, build.defines).attention(*case.heads(static), reserved)
        expected, known = attention(*exact(*case.heads(case.qkv[:, i : i + 1])), known)
        build.near(device.to_host(y), expected, np.full_like(expected, 4), products=True)
    assert list(device.to_host(here.length)) == [15, 11]
    assert here.most == 15


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
    """One part of many tiles, some parts of a few, and parts that are empty."""
    monkeypatch.setattr(cuda, "BLOCKS", blocks)
    Case(build, 4, b=1, kv=2, r=2, e=16, pieces=(300, 1, 3)).check(device)


@on_both
@pytest.mark.parametrize("e", [40, 13])
def test_attention_is_clean_under_the_sanitizers(sanitized, build, e, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cuda, "BLOCKS", 8)
    Case(build, 1, b=2, kv=2, r=4, e=e, pieces=(70, 2, 1)).check(sanitized, ragged=True)


@on_both
def test_attention_bears_approximate_mathematics(perturbed, build):  # noqa: F811
    Case(build, 1, r=4, e=40, pieces=(40, 2)).check(perturbed, ragged=True)


FAULTS = {
    "a query sees the next key": ("attention.cu", "(first + i) / r + 1, end)", "(first + i) / r + 2, end)"),
    "nobody waits for a stage": ("attention.cu", "copies.wait<0>();", ""),
    "what was summed is not scaled down": ("attention.cuh", "rows.out[c][i][half] *= keep;",
                                           "rows.out[c][i][half] *= 1.0f;"),
    "a warp's keys count as the first": ("attention_decode.cu", "* KEYS + warp * TURN;", "* KEYS;"),
    "parts count alike": ("attention_decode.cu", "counts = share(scale[0], top);", "counts = 1.0f;"),
    "padding counts": ("attention.cu", "length[b] += added(n, b, l);", "length[b] += l;"),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    broken = planted(tmp_path, *FAULTS[fault])
    with pytest.raises(AssertionError):
        Case(FLOAT32, 3, r=4, e=20, pieces=(70, 40, 1, 1)).check(broken, ragged=True)


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

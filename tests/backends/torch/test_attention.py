"""Attention of one position in the compiled loops: one pass in pieces and blocks, any heads, any lengths."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec import state
from refengine.spec.ops import DEFINITION
from tests.support.torch_benches import Torch, on_all, torch, values

from torch.profiler import ProfilerActivity, profile  # isort: skip
from refengine.backends.cpu import native  # isort: skip
from refengine.backends.pytorch.attention import Cache  # isort: skip

SEED = st.integers(0, 9999)
HEADS = st.tuples(st.sampled_from((1, 2, 7, 16, 21, 40)), st.integers(1, 2))  # for each key head; key heads
LENGTH = st.sampled_from((0, 1, 47, 48, 479, 480, 481, 1000))  # a block of keys, a piece, and around them


class Sizes(NamedTuple):
    """The sizes of a configuration that a cache needs."""

    num_key_value_heads: int
    head_dim: int


def drawn(how, seed, b, heads, e, longest):
    """Return q, k, v of a position, and keys, values and lengths of a cache; scores grow towards its end."""
    r, kv = heads
    length = np.random.default_rng(seed).integers(0, longest + 1, b)
    length[seed % b] = longest
    q = values(how, seed, b, 1, r * kv, e, scale=4)
    k, v = (values(how, seed + i, b, 1, kv, e) for i in (1, 2))
    K, V = (values(how, seed + i, b, longest, kv, e) for i in (3, 4))
    return q, k, v, how.rounded(K * np.linspace(1, 4, longest)[:, None, None]), V, length


def exact(K, V, length):
    """Return the cache of the definition, in float64."""
    nothing, zero = np.zeros((len(K), 0, *K.shape[2:])), np.zeros(len(K), np.int64)
    return state.Cache(nothing, nothing, zero, zero.copy()).append(K, V, length)


@on_all
@given(seed=SEED, b=st.integers(1, 3), heads=HEADS, e=st.sampled_from((1, 10, 33)), longest=LENGTH)
def test_a_step_reads_what_each_row_knows(how, seed, b, heads, e, longest):
    """Rows have different lengths and some read nothing; a second step continues from each length."""
    here, (q, k, v, K, V, length) = how(), drawn(how, seed, b, heads, e, longest)
    n = np.random.default_rng([seed, 1]).integers(0, 2, b)
    there, cache = exact(K, V, length), here.new_state("*", Sizes(heads[1], e), b)
    if longest:
        cache = cache.append(*here.give(K, V), here.array(length))
    for step in range(2):
        y, cache = here.ops.attention(*here.give(q, k, v), cache, here.array(n))
        expected, there = DEFINITION.attention(q, k, v, there, n)
        real = n > 0
        how.near(here.fetch(y)[real], expected[real], longest + 16 * e, f"step {step}")
        np.testing.assert_array_equal(here.fetch(cache.length), there.length)
        q, k, v = -q, v, k


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(seed=SEED, b=st.integers(1, 3), heads=HEADS, e=st.sampled_from((1, 10, 33, 128)), longest=LENGTH)
def test_a_cache_of_either_dtype_is_read_in_float32(dtype, seed, b, heads, e, longest):
    kind = getattr(torch, dtype)
    if native.load() is None:
        pytest.skip("no C++ compiler")
    how = Torch("loop", dtype, compute="float32")
    q, k, v, K, V, length = drawn(how, seed, b, heads, e, longest)
    cache = Cache.empty(Sizes(heads[1], e), b, kind, torch.device("cpu"))
    if longest:
        cache = cache.append(*(torch.from_numpy(a).to(kind) for a in (K, V)), torch.from_numpy(length))
    here = torch.from_numpy(q).float(), torch.from_numpy(k).to(kind), torch.from_numpy(v).to(kind)
    y, _ = how().ops.attention(*here, cache)
    expected, _ = DEFINITION.attention(q, k, v, exact(K, V, length))
    how.near(y.numpy(), expected, longest + 16 * e)


def test_a_cache_that_grows_by_single_positions_seldom_moves():
    cache = Cache.empty(Sizes(2, 4), 1, torch.float32, torch.device("cpu"))
    one, rooms = torch.ones(1, 1, 2, 4), set()
    for _ in range(1000):
        cache = cache.append(one, one)
        rooms.add(cache.k.shape[2])
    assert len(rooms) <= 10


def test_a_buffer_that_no_other_state_shares_is_not_copied_to_append():
    """Neither a new buffer nor one whose rows left or joined is copied; that of a fork is copied."""
    one = torch.ones(2, 1, 2, 4)
    known = Cache.empty(Sizes(2, 4), 2, torch.float32, torch.device("cpu")).append(one, one)
    left = known.take([1, 0])
    for cache in (known, left, known.put([0], known.take([1])), left.tentative()):
        fork, other = cache.fork(), cache.fork()
        assert cache.append(one, one).k is cache.k
        for later in (fork.append(2 * one, one), other.append(3 * one, one)):
            assert later.k is not cache.k and cache.k[0, 0, 1, 0] == 1
        assert (known.k[:, :, 1] <= 1).all() and known.length.tolist() == [1, 1]


@pytest.mark.parametrize("length", [1, 64])
@pytest.mark.parametrize("compute, compiled", [("float32", True), ("float32", False), ("bfloat16", True)])
def test_no_key_head_is_repeated_in_memory(compute, compiled, length):
    """With 6,000 positions that 16 query heads share, a call allocates less than three times their memory."""
    how = Torch("shared", compute, compute, compiled=compiled)
    here, q = how(), how().give(values(how, 1, 1, length, 16, 64))
    keys, k = here.give(values(how, 0, 1, 6000, 1, 64)), here.give(values(how, 2, 1, length, 1, 64))
    cache = here.new_state("*", Sizes(1, 64), 1).append(keys, keys)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        here.ops.attention(q, k, k, cache)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in run.key_averages())
    assert allocated < 3 * 2 * keys.nbytes

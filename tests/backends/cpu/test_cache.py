"""The cache of the CPU backend lies in pages: it grows, forks and changes rows without a copy of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.backends.cpu import cpu_backend, native
from refengine.backends.cpu.state import FIRST, PAGE, Cache
from refengine.conformance.cases import Case
from refengine.spec.model import Model
from refengine.spec.numerics import KV_DTYPES, Stored
from refengine.spec.state import Cache as Definition
from tests.support.stored import check_cache, check_scan

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
BFLOAT16 = Stored(KV_DTYPES["bfloat16"])


class Sizes:
    num_key_value_heads, head_dim = 2, 4


def numbers(seed: int, b: int, l: int):
    """Return keys and values that bfloat16 represents exactly, b l kv e."""
    rng = np.random.default_rng([seed, b, l])
    return [rng.integers(-99, 99, (b, l, 2, 4)).astype(np.float32) for _ in "kv"]


def definition(b: int) -> Definition:
    nothing, zero = np.zeros((b, 0, 2, 4)), np.zeros(b, np.int64)
    return Definition(nothing, nothing, zero, zero.copy())


def same(here: Cache, there: Definition) -> None:
    """Check that every row of both caches has the same keys and values."""
    np.testing.assert_array_equal(here.length, there.length)
    for row, end in enumerate(there.length):
        for mine, theirs in ((here.k, there.k), (here.v, there.v)):
            np.testing.assert_array_equal(
                mine[row, :, :end].astype(np.float64), theirs[row, :end].swapaxes(0, 1)
            )


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("append", "fork", "take", "put", "tentative", "long")),
        st.integers(0, 9), st.integers(0, 99),
    ),
    min_size=3, max_size=12,
)  # fmt: skip


@given(steps=STEPS)
def test_pages_hold_what_the_definition_holds_through_forks_and_changes_of_rows(steps):
    """Several forks append in turns; no fork sees the positions that another appended."""
    futures = [(Cache.empty(Sizes, 3, BFLOAT16), definition(3))]
    for what, which, seed in steps:
        here, there = futures[which % len(futures)]
        b, rng = len(there.length), np.random.default_rng(seed)
        if what == "fork":
            futures.append((here.fork(), there.fork()))
            continue
        if what == "take":
            rows = rng.integers(0, b, b).tolist()
            here, there = here.take(rows), there.take(rows)
        elif what == "put":
            other, others = futures[seed % len(futures)]
            here, there = here.put([0], other.take([b - 1])), there.put([0], others.take([b - 1]))
        else:
            k, v = numbers(seed, b, PAGE + 7 if what == "long" else 1 + seed % 70)
            n = rng.integers(0, k.shape[1] + 1, b) if seed % 2 else None
            if what == "tentative":
                same(here.tentative().append(k + 1, v + 1, n), there.tentative().append(k + 1, v + 1, n))
            same(here, there)
            here, there = here.append(k, v, n), there.append(k, v, n)
        futures[which % len(futures)] = here, there
        for one, other in futures:
            same(one, other)


def test_a_cache_that_grows_copies_no_page_but_the_first_and_takes_no_more_than_it_holds():
    cache, addresses = Cache.empty(Sizes, 1, BFLOAT16), set()
    k, v = numbers(0, 1, 500)
    for _ in range(30):
        cache = cache.append(k, v)
        addresses |= {page.data.ctypes.data for page in cache.pages[0][1:]}
    held = sum(page.data.nbytes for page in cache.pages[0])
    assert len(addresses) == len(cache.pages[0]) - 1, "the others stay where they are"
    exact = 2 * 2 * 4 * 2 * 15000
    assert exact <= held <= 1.1 * exact
    few = Cache.empty(Sizes, 1, BFLOAT16).append(*numbers(0, 1, 3))
    assert sum(page.room for page in few.pages[0]) == FIRST


def test_sequences_join_and_leave_without_a_copy():
    one, two = (Cache.empty(Sizes, 1, BFLOAT16).append(*numbers(i, 1, 5000)) for i in (1, 2))
    both = one.take([0, 0]).put([1], two)
    assert both.pages == (one.pages[0], two.pages[0])
    after = both.append(*numbers(3, 2, 1))
    assert [row[:2] for row in after.pages] == [row[:2] for row in both.pages]
    assert after.take([1]).pages[0] is after.pages[1]


@pytest.mark.parametrize("kv", KV_DTYPES)
@given(
    seed=st.integers(0, 99),
    cut=st.integers(1, 16),
    ragged=st.booleans(),
    head_dim=st.sampled_from((10, 7, 64, 128)),
)
def test_a_stored_cache_is_attention_over_rounded_keys_and_values(kv, seed, cut, ragged, head_dim):
    case = Case(layers="*", seed=seed, head_dim=head_dim, attention=((6, 2), (32, 2), (5, 1))[seed % 3])
    check_cache(cpu_backend(threads=2, kv=kv), kv, case, cut, ragged)


@pytest.mark.parametrize("kv", KV_DTYPES)
@pytest.mark.parametrize("length", [47, 48, 95, 96, 97, 479, 480, 481, 1919, 1920, 1921, 2500])
def test_a_step_and_a_call_agree_around_every_border(kv, length):
    """At borders of key blocks, pieces of the context and pages, a step agrees with a longer call."""
    case = Case(layers="*", batch=2, length=4, head_dim=128, attention=(32, 2))
    backend, cfg = cpu_backend(threads=2, kv=kv), case.cfg
    k, v = (case.normal(i, 2, length, 2, 128).astype(np.float32) for i in (1, 2))
    q, more, values = (
        case.normal(i, 2, 3, width, 128).astype(np.float32) for i, width in ((3, 32), (4, 2), (5, 2))
    )
    before = backend.new_state("*", cfg, 2).append(k, v)
    whole, _ = backend.ops.attention(q, more, values, before.fork())
    for i in range(3):
        at = slice(i, i + 1)
        y, before = backend.ops.attention(q[:, at], more[:, at], values[:, at], before)
        np.testing.assert_allclose(y, whole[:, at], rtol=2e-5, atol=2e-6)


@given(seed=st.integers(0, 99), head_dim=st.sampled_from((7, 9)))
def test_a_state_in_float16_is_that_of_the_definition(seed, head_dim):
    case = Case(layers="M", seed=seed, mamba_head_dim=head_dim, ssm_state_size=(5, 4, 16, 19)[seed % 4])
    check_scan(cpu_backend(threads=2, ssm="float16"), case)


@pytest.mark.parametrize("kv, ssm", [("bfloat16", None), ("fp8", "float16"), (None, "float16")])
def test_a_whole_step_is_the_verbs_one_after_another(kv, ssm):
    """States agree too: both ways round stored numbers in the same way."""
    from refengine.backends.cpu.steps import plain

    case = Case(layers="M*E-M*", batch=3, length=9)
    m = Model.build(case.cfg, case.read, cpu_backend("bfloat16", 2, kv=kv, ssm=ssm))
    _, states = m.blocks(m.embed(case.ids), m.new_states(3), case.lengths)
    one, other = states, [s and s.take([0, 1, 2]) for s in states]
    for token in case.rng(4).integers(0, case.cfg.vocab_size, (5, 3)):
        (a, one), (b, other) = m.backend.step(m, token, one), plain(m, token, other)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(one, other, strict=True):
        if hasattr(mine, "S") and ssm:
            assert mine.position.tolist() == theirs.position.tolist() == (case.lengths + 5).tolist()
        if hasattr(mine, "k"):
            same_dtype = mine.k.dtype == theirs.k.dtype == m.new_states(1)[1].k.dtype
            assert same_dtype and np.array_equal(mine.length, theirs.length)

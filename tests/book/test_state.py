"""Sequences join, leave, change rows and fork without affecting each other's states."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.checks import laws
from refengine.conformance.strategies import cases
from refengine.spec.state import new_state
from tests.support.checks import test_of

test_whoever_joins_leaves_or_forks_every_sequence_reads_as_if_alone = test_of(
    laws.sequences_that_join_leave_or_fork_read_as_if_alone
)


@given(case=cases("M*", max_length=1), slots=st.integers(1, 3))
def test_a_forked_cache_shares_its_memory_until_one_of_them_goes_on(case, slots):
    cfg = case.cfg
    k = case.normal(0, slots, 3, cfg.num_key_value_heads, cfg.head_dim)
    cache = new_state("*", cfg, slots, np.float64).append(k, k)
    fork = cache.fork()
    assert np.shares_memory(fork.k, cache.k)
    first, second = cache.append(k + 1, k + 1), fork.append(k + 2, k + 2)
    for after, step in ((first, 1), (second, 2)):
        assert np.array_equal(after.upto(6)[0], np.concatenate([k, k + step], axis=1))
    assert np.array_equal(cache.upto(3)[0], k)


@given(case=cases("M*", max_length=1), slots=st.integers(2, 4))
def test_taking_a_run_of_slots_is_taking_each_of_them(case, slots):
    """`rows` may be a slice: the taken states continue without writing into the others."""
    cfg = case.cfg
    k = case.normal(0, slots, 3, cfg.num_key_value_heads, cfg.head_dim)
    cache = new_state("*", cfg, slots, np.float64).append(k, k)
    taken = cache.take(slice(0, 1)).append(k[:1] + 1, k[:1] + 1)
    rest = cache.append(k + 2, k + 2)
    assert np.array_equal(taken.upto(6)[0], np.concatenate([k, k + 1], axis=1)[:1])
    assert np.array_equal(rest.upto(6)[0], np.concatenate([k, k + 2], axis=1))

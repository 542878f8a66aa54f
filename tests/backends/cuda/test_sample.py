"""From ids to vectors, and from logits to the few ids worth choosing from."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.backends.cuda import sample as cuda
from refengine.backends.cuda.sample import Tokens
from refengine.spec.config import InputError
from refengine.spec.sample import alternatives
from tests.support.cuda_device import device, needs_compiler, sanitized  # noqa: F401
from tests.support.cuda_verbs import FLOAT32, constants, on_both, planted

SEED = st.integers(0, 9999)


def embedded(device, build, seed, shape, v=50, d=24):  # noqa: F811
    ids = np.random.default_rng(seed).integers(0, v, shape).astype(np.int32)
    table = build.values(seed, v, d)
    x = Tokens(device, build.defines).embed(device.from_host(ids), device.from_host(table))
    assert np.array_equal(device.to_host(x), table[ids])


@on_both
@given(seed=SEED, b=st.integers(1, 3), l=st.integers(1, 9), d=st.integers(1, 40) | st.just(2056))
def test_an_embedding_is_a_row_of_the_table(device, build, seed, b, l, d):  # noqa: F811
    embedded(device, build, seed, (b, l), d=d)


@on_both
def test_an_id_outside_the_table_is_not_a_number_and_hides_nothing(device, build):  # noqa: F811
    table, ids = build.values(0, 5, 16), np.array([[4, 5, -1, 0]], np.int32)
    x = Tokens(device, build.defines).embed(device.from_host(ids), device.from_host(table))
    x = device.to_host(x).astype(np.float32)
    assert np.isnan(x[0, 1:3]).all() and np.array_equal(x[0, [0, 3]], table[[4, 0]].astype(np.float32))


def chosen(device, logits, k):  # noqa: F811
    """Against the whole row, sorted; equal ones in order of their ids."""
    value, index = map(device.to_host, Tokens(device).candidates(device.from_host(logits), k))
    expected = np.argsort(-logits, axis=1, kind="stable")[:, : min(k, logits.shape[1])]
    assert np.array_equal(index, expected)
    assert np.array_equal(value, np.take_along_axis(logits, expected, axis=1))


@given(seed=SEED, rows=st.integers(1, 3), v=st.integers(1, 3000), k=st.integers(1, 70), coarse=st.booleans())
@example(seed=0, rows=2, v=9000, k=512, coarse=True)
@example(seed=0, rows=1, v=1025, k=1, coarse=True)
def test_the_candidates_are_the_largest_and_the_lowest_id_wins_a_tie(
    device,  # noqa: F811
    seed,
    rows,
    v,
    k,
    coarse,
):
    """coarse: many are equal, and some of the zeros are negative."""
    logits = np.random.default_rng(seed).standard_normal((rows, v)).astype(np.float32)
    chosen(device, np.round(logits) if coarse else logits, k)


def test_the_candidates_are_those_of_the_sampler(device):  # noqa: F811
    logits = np.random.default_rng(0).standard_normal((1, 2500)).astype(np.float32)
    _, index = Tokens(device).candidates(device.from_host(logits), 20)
    assert list(device.to_host(index)[0]) == [i for i, _ in alternatives(logits[0].astype(np.float64), 20)]
    assert device.to_host(Tokens(device).argmax(device.from_host(logits))) == [logits.argmax()]


@needs_compiler
def test_infinities_are_in_order_and_what_is_not_a_number_comes_first(device):  # noqa: F811
    logits = np.array([[1, -np.inf, np.inf, 2, -np.nan, np.nan]], np.float32)
    value, index = map(device.to_host, Tokens(device).candidates(device.from_host(logits), 6))
    assert list(index[0]) == [4, 5, 2, 3, 0, 1]
    assert np.isnan(value[0, :2]).all() and list(value[0, 2:]) == [np.inf, 2, 1, -np.inf]


def test_tokens_are_clean_under_the_sanitizers(sanitized):  # noqa: F811
    embedded(sanitized, FLOAT32, 1, (2, 3))
    embedded(sanitized, FLOAT32, 1, (2, 3), d=13)
    chosen(sanitized, np.random.default_rng(0).standard_normal((2, 2500)).astype(np.float32), 9)


@needs_compiler
def test_a_tie_that_goes_to_the_highest_id_is_seen(tmp_path):
    broken = planted(tmp_path, "candidates.cu", "<< 32 | ~(unsigned)index", "<< 32 | (unsigned)index")
    with pytest.raises(AssertionError):
        chosen(broken, np.zeros((1, 30), np.float32), 5)


@needs_compiler
def test_more_candidates_than_a_kernel_keeps_are_refused_in_a_sentence(device):  # noqa: F811
    assert constants("candidates.cu")["WIDTH"] == cuda.WIDTH
    with pytest.raises(InputError, match="1 to 512 candidates, not 513"):
        Tokens(device).candidates(device.zeros((1, 2000), "float32"), 513)

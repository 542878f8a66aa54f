"""The embedding on CUDA returns the rows of the token ids."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.backends.cuda.embedding import Embedding
from tests.support.cuda_device import device, sanitized  # noqa: F401
from tests.support.cuda_verbs import FLOAT32, on_both

SEED = st.integers(0, 9999)


def embedded(device, build, seed, shape, v=50, d=24):  # noqa: F811
    ids = np.random.default_rng(seed).integers(0, v, shape).astype(np.int32)
    table = build.values(seed, v, d)
    x = Embedding(device, build.defines).embed(device.from_host(ids), device.from_host(table))
    assert np.array_equal(device.to_host(x), table[ids])


@on_both
@given(seed=SEED, b=st.integers(1, 3), l=st.integers(1, 9), d=st.integers(1, 40) | st.just(2056))
def test_an_embedding_is_a_row_of_the_table(device, build, seed, b, l, d):  # noqa: F811
    embedded(device, build, seed, (b, l), d=d)


@on_both
def test_an_id_outside_the_table_is_not_a_number_and_hides_nothing(device, build):  # noqa: F811
    table, ids = build.values(0, 5, 16), np.array([[4, 5, -1, 0]], np.int32)
    x = Embedding(device, build.defines).embed(device.from_host(ids), device.from_host(table))
    x = device.to_host(x).astype(np.float32)
    assert np.isnan(x[0, 1:3]).all() and np.array_equal(x[0, [0, 3]], table[[4, 0]].astype(np.float32))


def test_an_embedding_is_clean_under_the_sanitizers(sanitized):  # noqa: F811
    embedded(sanitized, FLOAT32, 1, (2, 3))
    embedded(sanitized, FLOAT32, 1, (2, 3), d=13)

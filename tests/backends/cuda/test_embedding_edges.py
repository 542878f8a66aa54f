"""The first and the last row of a table can be looked up; an id outside the table gives a row of NaN."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of that name)

import numpy as np
import pytest

from refengine.backends.cuda.embedding import Embedding
from tests.support.cuda_device import device
from tests.support.cuda_verbs import on_both


@on_both
@pytest.mark.parametrize("width", [7, 16])
def test_the_borders_of_the_table_are_where_they_are(device, build, width):
    vocabulary = 5
    memory = build.values(1, vocabulary + 2, width)  # one more row before and after the table
    table = memory[1:-1]
    ids = np.array([[0, vocabulary - 1, vocabulary, -1, vocabulary + 1, 2**31 - 1, -(2**31), 2]], np.int32)
    verb = Embedding(device, build.defines).embed
    x = device.to_host(verb(device.from_host(ids), device.from_host(memory)[1:-1])).astype(np.float32)
    for row, i in zip(x[0], ids[0], strict=True):
        if 0 <= i < vocabulary:
            assert np.array_equal(row, table[i].astype(np.float32))
        else:
            assert np.isnan(row).all(), f"id {i}"

"""Sequences that draw together draw the same tokens as alone, whatever options the others have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.generation import Drawing, draw_greedily
from refengine.spec.config import InputError
from refengine.spec.sample import Sampling

GREEDY, DRAWN = Sampling(temperature=0), Sampling(temperature=0.8, top_p=0.9)
PENALISED = Sampling(temperature=0, repetition_penalty=1.5)
HOW = st.tuples(
    st.sampled_from([GREEDY, GREEDY, GREEDY, DRAWN, PENALISED]), st.sampled_from([None, None, 0, 2])
)
LOGITS = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0, -np.inf])  # equal ones are frequent
WRONG = st.sampled_from([None, None, np.nan, np.inf])


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@given(data=st.data())
def test_a_row_draws_what_it_would_alone(dtype, data):
    hows = data.draw(
        st.lists(HOW, min_size=1, max_size=5) | st.lists(st.just((GREEDY, None)), min_size=2, max_size=5)
    )
    logits = np.array([data.draw(st.lists(LOGITS, min_size=7, max_size=7)) for _ in hows], dtype)
    for row in logits:
        if (wrong := data.draw(WRONG)) is not None:
            row[data.draw(st.integers(0, 6))] = wrong
    together, alone = ([Drawing(s, 3, n, [1, 4]) for s, n in hows] for _ in range(2))
    drawn = draw_greedily(together, logits) or [
        one.attempt(row) for one, row in zip(together, logits, strict=True)
    ]
    for one, row, got, beside in zip(alone, logits, drawn, together, strict=True):
        try:
            assert got == one.draw(row)
        except InputError as error:
            assert str(got) == str(error)
        assert beside.ids == one.ids and beside.generator.random() == one.generator.random()

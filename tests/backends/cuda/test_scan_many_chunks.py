"""In a prompt of many chunks with slow decay, each chunk decays by its own steps, and none is lost."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of that name)

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.cuda_device import device
from tests.support.cuda_scans import check, drawn
from tests.support.cuda_verbs import on_both


@on_both
@settings(max_examples=3)
@given(seed=st.integers(0, 999), chunks=st.integers(5, 9), over=st.integers(0, 127), ragged=st.booleans())
@example(seed=1, chunks=9, over=5, ragged=False)
@example(seed=2, chunks=6, over=0, ragged=True)
def test_many_chunks_with_slow_steps_are_the_recurrence(device, build, seed, chunks, over, ragged):
    length = 128 * chunks + over
    x, dt, A_log, B, C, D, bias, S = drawn(build, seed, 1 + ragged, length, (1, 2), (4, 8))
    ramp = np.linspace(-9, -4, length, dtype=np.float32)[:, None]  # steps of 1/8000 to 1/50
    dt = np.broadcast_to(ramp, dt.shape).astype(x.dtype)
    arrays = x, dt, 0 * A_log, B, C, D, 0 * bias, S
    check(device, build, arrays, np.array([length, 300], np.int32) if ragged else None)

"""The scan stays exact if small steps follow large ones: a decay comes from the difference of two sums.

A sum of dt A over a chunk reaches tens of thousands, where float32 has steps of a hundredth. The decay from
one later position to the next is the exponential of a difference of such sums, and close to 1.
"""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, agree, cases
from refengine.spec.ops import DEFINITION


@given(case=cases("M", chunk_size=64), fast=st.integers(1, 30), slow=st.integers(2, 30))
@example(case=Case(layers="M", chunk_size=64), fast=40, slow=60)
@example(case=Case(layers="M", batch=1), fast=9, slow=20)
def test_slow_steps_after_fast_ones_are_as_exact_as_ever(backend, case, fast, slow):
    """Outputs and state after `fast` steps of some hundreds each, then `slow` steps of about 1/400."""
    c, b, t = case.cfg, case.batch, fast + slow
    h, p, g, n = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
    x, dt, S = case.normal(0, b, t, h, p), case.normal(1, b, t, h), case.normal(2, b, h, p, n)
    B, C = case.normal(3, b, t, g, n), case.normal(4, b, t, g, n)
    A_log, D, bias = (case.exact(key) for key in ("A_log", "D", "dt_bias"))
    dt[:, :fast] = 300.0
    dt[:, fast:] = (0.5 * np.tanh(dt[:, fast:]) - 6.0 - bias).astype(np.float32)
    w, last = backend.weights(c, case.read), (None, (0.0, np.inf), c.chunk_size)
    stretch = 1.0 if backend.dtype == np.float32 else 5000.0 * fast  # no dtype is wider than float64
    before = backend.state("M", c, b, S=S).S
    (x_, dt_), (B_, C_) = backend.give(x, dt), backend.give(B, C)
    y, after = backend.ops.ssd_scan(x_, dt_, w["A_log"], B_, C_, w["D"], w["dt_bias"], before, *last)
    true_y, true_S = DEFINITION.ssd_scan(x, dt, A_log, B, C, D, bias, S, *last)
    for what, mine, true in (("y", backend.fetch(y), true_y), ("S", backend.fetch(after), true_S)):
        if what == "y":  # only the small steps; earlier outputs are as large as their steps
            mine, true = mine[:, fast:], true[:, fast:]
        agree(mine, true, backend.dtype, t * n, what, stretch)

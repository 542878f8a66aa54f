"""A scan of one position uses the softplus of dt, for every size of dt: tiny, about one, large."""

import numpy as np

from refengine.conformance.cases import Case, agree
from refengine.spec.ops import DEFINITION

CASE = Case(layers="M", batch=31)
LAST = (None, (0.0, np.inf), 11)


def test_one_position_steps_as_far_as_softplus_says(backend):
    c, b = CASE.cfg, CASE.batch
    h, p, g, n = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
    x, S = CASE.normal(0, b, 1, h, p), CASE.normal(1, b, h, p, n)
    B, C = CASE.normal(2, b, 1, g, n), CASE.normal(3, b, 1, g, n)
    A_log, D, bias = (CASE.exact(key) for key in ("A_log", "D", "dt_bias"))
    raw = np.linspace(-15, 30, b)[:, None, None] - bias  # a row for each size
    dt = raw.astype(np.float32).astype(np.float64)
    w, before = backend.weights(c, CASE.read), backend.state("M", c, b, S=S).S
    (x_, dt_), (B_, C_) = backend.give(x, dt), backend.give(B, C)
    y, after = backend.ops.ssd_scan(x_, dt_, w["A_log"], B_, C_, w["D"], w["dt_bias"], before, *LAST)
    true_y, true_S = DEFINITION.ssd_scan(x, dt, A_log, B, C, D, bias, S, *LAST)
    for row in range(b):
        for what, mine, true in (("y", backend.fetch(y), true_y), ("S", backend.fetch(after), true_S)):
            agree(mine[row], true[row], backend.dtype, n, f"{what} of row {row}")

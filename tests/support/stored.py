"""Check a backend with states stored in fewer bits against the definition with the same rounding."""

from __future__ import annotations

import numpy as np

from refengine.conformance.cases import Case
from refengine.spec.numerics import KV_DTYPES, Stored, tolerance
from refengine.spec.ops import DEFINITION, Backend
from refengine.spec.state import keyed, new_state


def check_cache(
    backend: Backend, kv: str, case: Case, cut: int, ragged: bool = False, near: float = 1.0
) -> None:
    """Check attention over a stored cache, in two calls and a step, against rounded keys and values.

    near: the largest error of a backend, in multiples of that of float32.
    """
    cfg, b, l = case.cfg, case.batch, case.length
    scales = (0.02, 0.5) if kv == "fp8" else (1.0, 1.0)
    widths = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads
    q, k, v = (case.normal(i, b, l + 1, width, cfg.head_dim) for i, width in enumerate(widths))
    form = Stored(KV_DTYPES[kv], *scales)
    k, v = (form.wide(form.narrow(a, s), s, np.float64) for a, s in zip((k, v), scales, strict=True))
    here, there = backend.new_state("*", cfg, b).scaled(*scales), new_state("*", cfg, b, np.float64)
    n = case.rng(9).integers(0, l - cut + 1, b) if ragged else np.full(b, l - cut)
    for part, real in ((slice(0, cut), None), (slice(cut, l), n), (slice(l, l + 1), None)):
        given = [a[:, part] for a in (q, k, v)]
        arrays = [backend.array(a.astype(np.float32)) for a in given]
        lengths = None if real is None else backend.array(real)
        y, here = backend.ops.attention(*arrays, here, lengths)
        expected, there = DEFINITION.attention(*given, there, real)
        y, size = backend.fetch(y), max(1.0, np.abs(expected).max(initial=0))
        for row in range(b):
            count = y.shape[1] if real is None else real[row]
            off = np.abs(y[row, :count] - expected[row, :count]).max(initial=0)
            assert off <= near * tolerance(np.float32, 64) * size, f"{kv}, row {row}: off by {off}"
    assert backend.fetch(here.length).tolist() == there.length.tolist()


def check_scan(backend: Backend, case: Case, exactly: bool = True) -> None:
    """Check S in float16 after calls of several positions and steps: the definition's, bit by bit.

    S is only added to, so that no sum rounds in float32; only the end of each call rounds.
    """
    cfg, b = case.cfg, case.batch
    here, there = keyed([backend.new_state("M", cfg, b)], range(b), 2), None
    there = keyed([new_state("M", cfg, b, np.float32, ssm="float16")], range(b), 2)[0]
    (here,) = here
    h, p, n = there.S.shape[1:]
    one, rng = np.float32, case.rng(3)
    for length in (3, 1, 1, 40, 1):
        x = rng.integers(0, 50, (b, length, h, p)).astype(one) * one(2.0**-13)
        dt, still = np.zeros((b, length, h), one), np.full(h, -1e4, one)
        B, zero, limits = np.ones((b, length, 1, n), one), np.zeros(h, one), (1.0, 1.0)
        if cfg.n_groups > 1:
            B = np.repeat(B, cfg.n_groups, axis=2)
        real = rng.integers(0, length + 1, b) if length > 1 else None
        give = backend.array
        args = [give(a) for a in (x, dt, still, B, B, zero, zero)]
        _, S = backend.ops.ssd_scan(*args, here.read(), None if real is None else give(real), limits, 128)
        here = here.after(here.tail, S, length if real is None else give(real))
        _, S = DEFINITION.ssd_scan(x, dt, still, B, B, zero, zero, there.read(), real, limits, 128)
        there = there.after(there.tail, S, length if real is None else real)
        if exactly:
            np.testing.assert_array_equal(backend.fetch(here.S), there.S)

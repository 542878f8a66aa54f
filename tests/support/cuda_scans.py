"""Scans for tests of the CUDA backend: drawn, run on a device, and compared with the recurrence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from refengine.backends.cuda.scan import FEW, Scan
from refengine.spec.scan import ssd_scan
from tests.support.cuda_verbs import FLOAT32, exact, poisoned, small, within

NO_LIMIT = (0.0, math.inf)


def drawn(build, seed, b, l, groups, sizes):
    """Return x, dt, A_log, B, C, D, dt_bias, S, with steps from small to large."""
    (g, r), (p, n) = groups, sizes
    h = g * r
    x, B, C = (build.values(seed + i, b, l, *s) for i, s in enumerate(((h, p), (g, n), (g, n))))
    dt, bias = build.values(seed + 3, b, l, h), 2 * small(seed + 4, h) - 2
    return x, dt, small(seed + 5, h), B, C, small(seed + 6, h), bias, small(seed + 7, b, h, p, n)


def scan(device, build, arrays, n=None, limit=NO_LIMIT, around=(0, 0), S=None, chunk=128):
    """Run the verb on host arrays; x, dt, B and C are parts of wider arrays, and S may be on the device."""
    x, dt, A_log, B, C, D, bias, state = arrays
    flat = [within(device, a.reshape(*a.shape[:2], -1), *around).reshape(a.shape) for a in (x, dt, B, C)]
    S = device.from_host(state) if S is None else S
    A_log, D, bias = map(device.from_host, (A_log, D, bias))
    n = None if n is None else device.from_host(n)
    verb = Scan(device, build.defines).ssd_scan
    return verb(flat[0], flat[1], A_log, flat[2], flat[3], D, bias, S, n, limit, chunk)


def uncancelled(arrays, n=None, limit=NO_LIMIT):
    """Return the sizes of y and S if all products in them were positive."""
    positive = (a if i in (1, 2, 6) else abs(a) for i, a in enumerate(exact(*arrays)))
    return ssd_scan(*positive, n, limit)


def check(device, build, arrays, n=None, limit=NO_LIMIT, around=(0, 0)):
    """Compare y at real positions and the state after them with the recurrence; padding is NaN."""
    x, dt, A_log, B, C, D, bias, S = arrays
    given_arrays = arrays
    if n is not None:
        x, dt, B, C = (poisoned(a, n) for a in (x, dt, B, C))
        given_arrays = x, dt, A_log, B, C, D, bias, S
    y, after = (device.to_host(a) for a in scan(device, build, given_arrays, n, limit, around))
    expected, state = ssd_scan(*exact(*arrays), n, limit)
    whole, whole_state = uncancelled(arrays, n, limit)
    products = arrays[0].shape[1] > FEW  # made of activations
    for row in range(len(y)):
        end = y.shape[1] if n is None else n[row]
        build.near(y[row, :end], expected[row, :end], whole[row, :end], products, f"y of row {row}")
        FLOAT32.near(after[row], state[row], whole_state[row], what=f"S of row {row}")
        if not end:
            assert np.array_equal(after[row], S[row])


def stays(device, build, arrays, n, around=(0, 0)):
    """Check that a readonly call does not change the state, and returns the outputs of a call that does."""
    S = device.from_host(arrays[-1])
    kept, _ = scan(device, build, arrays, n, around=around, S=replace(S, readonly=True))
    assert np.array_equal(device.to_host(S), arrays[-1])
    y, _ = scan(device, build, arrays, n, around=around, S=S)
    assert not np.array_equal(device.to_host(S), arrays[-1]) or not n.any()
    for row, real in enumerate(n):
        assert np.array_equal(device.to_host(kept)[row, :real], device.to_host(y)[row, :real])

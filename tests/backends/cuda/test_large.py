"""Kernels address memory beyond 32 bits: rows far apart, long stacks and long caches.

Untouched memory costs nothing, so arrays of many gigabytes consist of pages that are never written. A verb
must give the same bits for rows far apart as for the same rows side by side.
"""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of that name)

import math

import numpy as np
import pytest

from refengine.backends.cuda.attention import Attention, Cache
from refengine.backends.cuda.embedding import Embedding
from refengine.backends.cuda.experts import Experts, Stacked
from refengine.backends.cuda.kernel import KERNELS
from refengine.backends.cuda.layers import Layers
from refengine.backends.cuda.scan import Scan
from refengine.spec.moe import Routing
from tests.backends.cuda.test_route import config
from tests.support.cuda_device import needs_compiler
from tests.support.cuda_scans import NO_LIMIT, drawn
from tests.support.cuda_sparse import SparseDevice, device
from tests.support.cuda_verbs import FLOAT32, small

FAR = 1 << 32  # elements from the first row to the last


def apart(device, a: np.ndarray, far: bool, axes: int = 1):
    """Return `a` on the device; far: rows of the first axes are so far apart that the last begins at FAR."""
    rows = a.reshape(math.prod(a.shape[:axes]), -1)
    stride = -(-FAR // max(1, len(rows) - 1) // 8) * 8 if far else rows.shape[1]
    x = device.empty((len(rows), stride), "float32")[:, : rows.shape[1]]
    for i, row in enumerate(rows):
        device.upload(x[i], row)
    return x.reshape(a.shape)


def same(device, verb):
    """Check for the same bits near and far; verb(place) returns arrays computed from place(array)."""
    near, far = (
        [device.to_host(y) for y in verb(lambda a, axes=1, far=far: apart(device, a, far, axes))]
        for far in (False, True)
    )
    for one, other in zip(near, far, strict=True):
        assert one.any() and np.array_equal(one, other)


@needs_compiler
def test_the_norms_count_rows_beyond_32_bits(device):
    x, w = FLOAT32.values(1, 3, 24), device.from_host(small(2, 24))
    verbs = Layers(device)
    same(device, lambda place: verbs.rms_norm(place(x), place(x), w, 1e-5))
    same(device, lambda place: [verbs.gated_rms_norm(place(x), place(x), w, 1e-5, 2)])


@needs_compiler
@pytest.mark.parametrize("b, l", [(1, 3), (3, 1)])
def test_the_convolution_counts_rows_beyond_32_bits(device, b, l):
    x, tail = FLOAT32.values(1, b, l, 24), FLOAT32.values(2, b, 3, 24)
    w, bias = device.from_host(small(3, 24, 1, 4)), device.from_host(small(4, 24))
    same(device, lambda place: Layers(device).causal_conv(place(x, 2), w, bias, device.from_host(tail)))


@needs_compiler
@pytest.mark.parametrize("tokens", [3, 40])
def test_the_router_counts_rows_beyond_32_bits(device, tokens):
    h, gate, bias = FLOAT32.values(1, tokens, 24), small(2, 16, 24), small(3, 16)
    gate, bias = map(device.from_host, (gate, bias))
    same(device, lambda place: Layers(device).route(place(h), gate, bias, config(4)))


@needs_compiler
@pytest.mark.parametrize("l", [3, 70])
def test_the_scan_counts_rows_beyond_32_bits(device, l):
    x, dt, A_log, B, C, D, bias, S = drawn(FLOAT32, 1, 1, l, (2, 1), (8, 16))
    A_log, D, bias = map(device.from_host, (A_log, D, bias))

    def scanned(place):
        far = [place(a.reshape(1, l, -1), 2).reshape(a.shape) for a in (x, dt, B, C)]
        return Scan(device).ssd_scan(*far[:2], A_log, *far[2:], D, bias, device.from_host(S), None, NO_LIMIT)

    same(device, scanned)


@needs_compiler
@pytest.mark.parametrize("l", [3, 70])
def test_attention_counts_positions_and_cached_rows_beyond_32_bits(device, l):
    b, kv, r, e = 2, 1, 2, 24
    q, k, v = (FLOAT32.values(seed, b, l, heads * e) for seed, heads in ((1, kv * r), (2, kv), (3, kv)))

    def attended(place):
        room = max(128, place(np.zeros((2, e), np.float32)).strides[0] // e)
        keys, values = (device.empty((b, kv, room, e), "float32") for _ in "kv")
        cache = Cache(keys, values, device.zeros((b,), "int32"))
        q_here, k_here, v_here = (place(a, 2).reshape(b, l, -1, e) for a in (q, k, v))
        y, cache = Attention(device).attention(q_here, k_here, v_here, cache)
        assert cache.k is keys, "there was room"
        again, _ = Attention(device).attention(q_here[:, :1], k_here[:, :1], v_here[:, :1], cache)
        return y, again

    same(device, attended)


@needs_compiler
@pytest.mark.parametrize("tokens", [2, 9])
def test_the_experts_count_tokens_and_matrices_beyond_32_bits(device, tokens):
    """Tokens choose only the last expert of a stack of 1,024."""
    count, i, x = 1024, 320, 1 << 13
    up, down = FLOAT32.values(1, i, x, scale=x**-0.5), FLOAT32.values(2, x, i)
    u, expert = FLOAT32.values(3, 1, tokens, x), np.full((1, tokens, 1), count - 1, np.int32)
    routing = Routing(device.from_host(expert), device.from_host(np.ones((1, tokens, 1), np.float32)))

    def summed(place):
        stacks = [device.empty((count, *matrix.shape), "float32") for matrix in (up, down)]
        for stack, matrix in zip(stacks, (up, down), strict=True):
            device.upload(stack[count - 1], matrix)
        return [Experts(device).experts(place(u, 2), Stacked(*stacks), routing)]

    same(device, summed)


@needs_compiler
def test_an_embedding_is_found_beyond_32_bits(device):
    table = device.empty(((1 << 17) + 1, 1 << 15), "float32")
    row = small(1, 1 << 15)
    device.upload(table[1 << 17], row)
    ids = device.from_host(np.array([1 << 17, 0], np.int32))
    assert np.array_equal(device.to_host(Embedding(device).embed(ids, table)), [row, np.zeros_like(row)])


@needs_compiler
def test_a_place_that_is_cut_to_32_bits_is_seen(device, tmp_path):
    for source in KERNELS.iterdir():
        (tmp_path / source.name).write_text(source.read_text().replace("x += row *", "x += (int)row * (int)"))
    with pytest.raises(AssertionError):
        test_the_norms_count_rows_beyond_32_bits(SparseDevice(kernels=tmp_path))

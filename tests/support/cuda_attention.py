"""One case of attention on CUDA: a batch of sequences in pieces, with each call checked."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np

from refengine.backends.cuda.attention import Attention, Cache
from refengine.spec.attention import attention
from refengine.spec.state import Cache as Definition
from tests.support.cuda_verbs import exact, lengths, poisoned


class Case:
    """Queries, keys and values of `sum(pieces)` positions, side by side as in the projection's output."""

    def __init__(self, build, seed, b=2, kv=2, r=3, e=10, pieces=(5, 1), scale=1.0):
        self.build, self.seed, self.b, self.kv, self.r, self.e = build, seed, b, kv, r, e
        self.ends, self.widths = np.cumsum([0, *pieces]), np.cumsum([0, kv * r * e, kv * e, kv * e])
        self.qkv = build.values(seed, b, self.ends[-1], self.widths[-1])
        self.qkv[..., : self.widths[2]] *= np.array(scale, build.dtype)

    def caches(self, device):
        cfg = SimpleNamespace(num_key_value_heads=self.kv, head_dim=self.e)
        k, v = (np.zeros((self.b, 0, self.kv, self.e)) for _ in "kv")
        length = np.zeros(self.b, np.int64)
        return Cache.empty(cfg, self.b, self.build.name, device), Definition(k, v, length, length.copy())

    def heads(self, qkv):
        """Return q b l h e, k and v b l kv e, as views of an array of the device or of NumPy."""
        parts = (qkv[..., begin:end] for begin, end in pairwise(self.widths))
        return [part.reshape(*part.shape[:2], part.shape[-1] // self.e, self.e) for part in parts]

    def step(self, device, caches, qkv, n=None):
        """Compare one call on both sides; results at padding are ignored."""
        here, known = caches
        given = device.from_host(qkv if n is None else poisoned(qkv, n))
        n_here = None if n is None else device.from_host(n)
        y, here = Attention(device, self.build.defines).attention(*self.heads(given), here, n_here)
        q, k, v = exact(*self.heads(qkv))
        apart = Definition(known.k.copy(), np.abs(known.v), known.length, known.length.copy())
        whole, _ = attention(q, k, np.abs(v), apart, n)
        expected, known = attention(q, k, v, known, n)
        y = device.to_host(y)
        for row, end in enumerate(n if n is not None else [qkv.shape[1]] * self.b):
            self.build.near(y[row, :end], expected[row, :end], whole[row, :end], True, f"row {row}")
        assert np.array_equal(device.to_host(here.length), known.length)
        return here, known

    def check(self, device, ragged=False):
        caches = self.caches(device)
        for i, (begin, end) in enumerate(pairwise(self.ends)):
            n = lengths(self.seed + i, self.b, end - begin) if ragged else None
            caches = self.step(device, caches, self.qkv[:, begin:end], n)
        return caches

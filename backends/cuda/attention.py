"""Attention and its cache: a prompt in tiles of queries, a step with the context cut into parts.

Keys and values lie as b kv t e with room to grow, so that appending copies nothing but the new ones. Lengths
stay on the device and move in place; a captured step finds the next position by itself. The host knows only
`most`, a bound on all of them, and makes room: before a captured step, `reserve(1)`; after it, `advanced(1)`;
if `reserve` returned another buffer, the step has to be captured again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from refengine.backends.cuda.array import DeviceArray
from refengine.backends.cuda.verbs import Verbs, tiles
from refengine.spec.config import InputError

HEAD = 128  # of keys.cuh: the largest head_dim
MANY = {4: (64, 16), 2: (128, 32)}  # of attention.cu, by bytes of an activation: queries and keys of a block
FEW = {4: (16, 32), 2: (16, 64)}  # of attention_decode.cu
FEW_ROWS = 128  # query rows of a key head up to which the context is cut into parts
KEPT = {"float32": "KEPT_F32", "bfloat16": "KEPT_BF16", "uint8": "KEPT_F8"}  # of kept.cuh
BLOCKS = 400  # about three for each multiprocessor of an H100 or B200


def roomy(room: int) -> int:
    """Return the positions of a new buffer: half as many again, then 256 more, then a sixteenth more."""
    return max(64, room + min(room // 2, max(256, room // 16)))


class Tip:
    """The last owner of a buffer, None at first. Only the state that owns it may append in place."""

    owner: object = None


@dataclass(frozen=True)
class Cache:
    """The first `length[b]` positions of a buffer that forks share; each fork has its own lengths."""

    k: DeviceArray  # b kv t e, room for more positions than are used
    v: DeviceArray
    length: DeviceArray  # b int32
    most: int = 0  # no length is larger
    tip: Tip = field(default_factory=Tip)  # of the buffer, the same in all forks
    mark: object = None  # what tip.owner is while this state stands at the tip
    real: str = "float32"  # dtype of the activations
    scales: tuple[float, float] = (1.0, 1.0)  # of k and v in FP8, whose dtype here is uint8

    @classmethod
    def empty(cls, cfg, batch: int, dtype: str, device, kv: str | None = None) -> Cache:
        """Return the cache of a layer that has read nothing; kv: its dtype, by default the activations'."""
        shape = batch, cfg.num_key_value_heads, 0, cfg.head_dim
        k, v = (device.empty(shape, "uint8" if kv == "fp8" else kv or dtype) for _ in "kv")
        return cls(k, v, device.zeros((batch,), "int32"), real=dtype)

    def scaled(self, k_scale: float, v_scale: float) -> Cache:
        """Return this empty cache with the scales of FP8; itself in any other dtype."""
        return replace(self, scales=(k_scale, v_scale)) if self.k.dtype == "uint8" else self

    @property
    def defines(self) -> tuple[str, ...]:
        """Return the defines of the kernels for its dtype and that of the activations."""
        real = ("REAL_BF16",) if self.real == "bfloat16" else ()
        return real if self.k.dtype == self.real else (*real, KEPT[self.k.dtype])

    def reserve(self, added: int) -> Cache:
        """Return this cache, or a copy, with room for `added` more positions that no fork will write to."""
        if self.most + added <= self.k.shape[2] and self.tip.owner is self.mark:
            return self
        return self.copied(self.most + added)

    def advanced(self, added: int) -> Cache:
        """Return the cache after at most `added` positions were appended to each row on the device."""
        mark = self.tip.owner = object()
        return replace(self, most=self.most + added, mark=mark)

    def copied(self, room: int) -> Cache:
        """Return a copy with `room`, and some more: after each copy a step is captured again."""
        (b, kv, _, e), device = self.k.shape, self.k.device
        k, v = (device.empty((b, kv, roomy(room), e), self.k.dtype) for _ in "kv")
        for known, new in ((self.k, k), (self.v, v)):
            if self.most:
                device.copy(known[:, :, : self.most], new[:, :, : self.most])
        return replace(self, k=k, v=v, tip=Tip(), mark=None)

    def take(self, rows) -> Cache:
        """Return the caches of these rows."""
        rows = np.arange(len(self.length))[rows]
        k, v, length = (a[rows] for a in (self.k, self.v, self.length))
        return replace(self, k=k, v=v, length=length, tip=Tip(), mark=None)

    def put(self, rows, other: Cache) -> Cache:
        """Return a cache in which these rows are those of `other`."""
        most, device = max(self.most, other.most), self.k.device
        mine, theirs = (cache.copied(most) for cache in (self, other))
        k, v = device.with_rows(mine.k, rows, theirs.k), device.with_rows(mine.v, rows, theirs.v)
        length = device.with_rows(self.length, rows, other.length)
        return Cache(k, v, length, most, real=self.real, scales=self.scales)

    def fork(self) -> Cache:
        """Return a second state of this point; appending to either leaves the other as it is."""
        return replace(self, length=self.length.copy())

    def tentative(self) -> Cache:
        """Return a fork whose positions do not count as written: the next append overwrites them."""
        mark = None if self.tip.owner is self.mark else object()
        return replace(self, length=self.length.copy(), tip=Tip(), mark=mark)

    def append(self, k, v, lengths=None) -> Cache:
        """Return the cache with k and v, b l kv e, appended; lengths[b] of the positions are real."""
        b, l = k.shape[:2]
        cache = self.reserve(l)
        cache.write(k.device, k, v, lengths)
        args = cache.length, lengths, np.int32(l), np.int32(b)
        k.device.launch("attention", "attention_advance", (tiles(b, 128),), (128,), args, 0, self.defines)
        return cache.advanced(l)

    def write(self, device, k, v, lengths) -> None:
        """Write k and v, b l kv e, where there is room for them beyond the lengths, which stay."""
        k, v = whole_heads(k), whole_heads(v)
        (b, l, kv, e), room = k.shape, self.k.shape[2]
        held = self.k, self.v, self.length, lengths
        args = (
            k,
            v,
            *places(k),
            *places(v),
            *held,
            *map(np.int32, (l, kv, e, room)),
            *map(np.float32, self.scales),
        )
        threads = min(256, 32 * tiles(kv * e, 32))
        device.launch("attention", "attention_append", (l, b), (threads,), args, 0, self.defines)


class Attention(Verbs):
    """The verb attention."""

    def attention(self, q, k, v, cache: Cache, lengths=None):
        """Return y b l h e and the next cache: y[i] = sum_{j <= i} softmax_j(q[i] . k[j] / sqrt(e)) v[j].

        q b l h e, k and v b l kv e -> b l h e
        """
        (_, l, h, e), kv = q.shape, k.shape[2]
        if e > HEAD:
            raise InputError(f"the cuda backend supports a head_dim of at most {HEAD}, not {e}")
        cache = cache.reserve(l)
        cache.write(self.device, k, v, lengths)
        q, y = whole_heads(q), self.device.empty(q.shape, self.dtype)
        given = q, *places(q), cache.k, cache.v, cache.length, lengths
        room = np.int32(cache.k.shape[2])
        scale = np.float32(math.log2(math.e) / math.sqrt(e) * cache.scales[0])
        sizes = *map(np.int32, (l, kv, h // kv, e)), room, scale
        attend = self.few if l * (h // kv) <= FEW_ROWS else self.many
        attend(given, sizes, y, cache, lengths)
        return y, cache.advanced(l)

    def many(self, given, sizes, y, cache: Cache, lengths):
        """Fill y by blocks of queries, for calls of many positions."""
        (b, l, h, _), kv = y.shape, cache.k.shape[1]
        queries, keys = MANY[self.size]
        grid = tiles(l * (h // kv), queries), kv, b
        shared = self.shared_bytes(queries, keys)
        args = *given, y, *sizes, np.float32(cache.scales[1])
        self.device.launch("attention", "attention", grid, (128,), args, shared, cache.defines)
        args = cache.length, lengths, np.int32(l), np.int32(b)
        self.launch("attention", "attention_advance", (tiles(b, 128),), 128, *args)

    def few(self, given, sizes, y, cache: Cache, lengths):
        """Fill y by parts of the context that are then added up, for calls of few positions."""
        (b, l, h, _), (_, kv, room, _) = y.shape, cache.k.shape
        queries, keys = FEW[self.size]
        side = tiles(l * (h // kv), queries)
        parts = min(tiles(BLOCKS, side * b * kv), tiles(room, keys))
        sums = self.device.empty((b * l * h, parts, HEAD), "float32")
        scales = self.device.empty((b * l * h, parts, 2), "float32")
        grid, shared = (side, parts, b * kv), self.shared_bytes(queries, keys)
        args = *given, sums, scales, *sizes
        self.device.launch("attention_decode", "attention_decode", grid, (128,), args, shared, cache.defines)
        args = (
            sums,
            scales,
            y,
            cache.length,
            lengths,
            *sizes[:4],
            np.int32(parts),
            np.float32(cache.scales[1]),
        )
        self.launch("attention_decode", "attention_combine", (l * h, b), 256, *args)

    def shared_bytes(self, queries: int, keys: int) -> int:
        """Return the bytes of the queries and of two stages of keys and values, with gaps between rows."""
        row = HEAD if self.size == 2 else HEAD + self.pack
        return self.size * (queries * row + 2 * keys * (row + HEAD + self.pack))


def whole_heads(x):
    """Return x b l h e with the heads of one position side by side."""
    h, e = x.shape[2:]
    return x if x.strides[3] == 1 and (h == 1 or x.strides[2] == e) else x.packed()


def places(x) -> tuple[np.int64, np.int64]:
    """Return how many elements apart the rows of a batch begin, and the positions of a row."""
    return np.int64(x.strides[0]), np.int64(x.strides[1])

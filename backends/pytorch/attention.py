"""Attention and its cache.

Keys and values lie as b kv t e with room to grow, so that those of a head are contiguous and an append copies
only the new ones. Their dtype is that of the activations or another; FP8 is stored as bytes of E4M3, divided
by a scale. Key heads are never repeated in memory. For one position, the query heads that share a key head
become rows of one product (on a CPU in the compiled loops, if there are any); for more positions, PyTorch's
fused attention takes the groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from refengine.backends.cpu.interface import filled
from refengine.backends.pytorch.state import index, with_rows


def roomy(room: int) -> int:
    """Return the positions of a new buffer: half as many again, then 256 more, then a sixteenth more."""
    return max(64, room + min(room // 2, max(256, room // 16)))


class Tip:
    """The owner of a buffer's end, None at first. Only the state that owns it may append in place."""

    owner: object = None


@dataclass(frozen=True)
class Cache:
    """The first `length[b]` positions of a buffer that forks share.

    `most` is an upper bound of the lengths that the host knows without a read from the device. `even`: all
    lengths equal `most`, so no mask is needed.
    """

    k: torch.Tensor  # b kv t e, room for more positions than are used
    v: torch.Tensor
    length: torch.Tensor  # b
    most: int = 0
    even: bool = True
    tip: Tip = field(default_factory=Tip)  # the buffer's owner, the same object in all forks
    mark: object = None  # equals tip.owner while this state owns the buffer's end
    scales: tuple[float, float] = (1.0, 1.0)  # of k and v in FP8, whose dtype here is uint8

    @classmethod
    def empty(cls, cfg, batch: int, dtype, device) -> Cache:
        """Return the cache of a layer that has read nothing; a `dtype` of torch.uint8 stands for FP8."""
        k, v = (
            torch.empty(batch, cfg.num_key_value_heads, 0, cfg.head_dim, dtype=dtype, device=device)
            for _ in "kv"
        )
        return cls(k, v, torch.zeros(batch, dtype=torch.long, device=device))

    @property
    def structure(self):
        """Return the structure Cache for the loops of the CPU backend, with one page for each row."""
        b, kv, room, e = self.k.shape
        size = kv * room * e * self.k.element_size()
        table = np.array(
            [(self.k.data_ptr() + i * size, self.v.data_ptr() + i * size, room * e) for i in range(b)]
        )
        kind = {torch.bfloat16: 2, torch.uint8: 8}.get(self.k.dtype, 0)  # with the numbers of structures.h
        made = filled("Cache", table.ctypes.data, 1, max(1, room), kind, *self.scales)
        made.table = table  # kept alive
        return made

    def scaled(self, k_scale: float, v_scale: float) -> Cache:
        """Return this empty cache with the scales of FP8; itself in any other dtype."""
        return replace(self, scales=(k_scale, v_scale)) if self.k.dtype == torch.uint8 else self

    def narrow(self, x, scale: float):
        """Return x in the stored dtype, rounded to nearest even; in FP8 at most 448 scale in magnitude."""
        if self.k.dtype != torch.uint8:
            return x.to(self.k.dtype)
        if x.dtype == torch.uint8:  # already in the stored dtype
            return x
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)

    def upto(self, t: int, dtype) -> tuple:
        """Return keys and values of the first t positions, b kv t e, in the dtype of the computation."""
        k, v = self.k[:, :, :t], self.v[:, :, :t]
        if self.k.dtype != torch.uint8:
            return k.to(dtype), v.to(dtype)
        k, v = (a.contiguous().view(torch.float8_e4m3fn).float() for a in (k, v))
        return (k * self.scales[0]).to(dtype), (v * self.scales[1]).to(dtype)

    def append(self, k, v, lengths=None) -> Cache:
        """Return the cache with k and v, b l kv e, appended; lengths[b] of the positions are real."""
        added = k.shape[1]
        k, v = (self.narrow(x, scale) for x, scale in zip((k, v), self.scales, strict=True))
        cache = self.reserve(added)
        if self.even:
            cache.k[:, :, self.most : self.most + added] = k.transpose(1, 2)
            cache.v[:, :, self.most : self.most + added] = v.transpose(1, 2)
        else:
            at = self.length[:, None] + torch.arange(added, device=k.device)  # b l
            at = at[:, None, :, None].expand(-1, k.shape[2], -1, k.shape[3])
            cache.k.scatter_(2, at, k.transpose(1, 2))
            cache.v.scatter_(2, at, v.transpose(1, 2))
        mark = cache.tip.owner = object()
        if lengths is None:
            return replace(cache, length=self.length + added, most=self.most + added, mark=mark)
        length = self.length + lengths
        if length.is_cuda:  # lengths stay on the device; only the bound is known here
            return replace(cache, length=length, most=self.most + added, even=False, mark=mark)
        most = int(length.max())
        return replace(cache, length=length, most=most, even=bool((length == most).all()), mark=mark)

    def reserve(self, added: int) -> Cache:
        """Return the same cache with room for more, in a buffer whose end it owns."""
        free = self.most + added <= self.k.shape[2] and self.tip.owner is self.mark
        return self if free else self.copied(self.most + added)

    def advanced(self) -> Cache:
        """Return the cache after one more position of every row has been written."""
        self.tip.owner = mark = object()
        return replace(self, length=self.length + 1, most=self.most + 1, mark=mark)

    def copied(self, room: int) -> Cache:
        """Return a copy with `room` and some more, so that few appends copy.

        Unused positions are zero, because those beyond a shorter row are read and multiplied by 0."""
        b, kv, _, e = self.k.shape
        k, v = (self.k.new_zeros(b, kv, roomy(room), e) for _ in "kv")
        k[:, :, : self.most], v[:, :, : self.most] = self.k[:, :, : self.most], self.v[:, :, : self.most]
        return replace(self, k=k, v=v, tip=Tip(), mark=None)

    def take(self, rows) -> Cache:
        """Return the caches of these rows."""
        rows = index(rows, self.k.device)
        k, v, length = (a[rows] for a in (self.k, self.v, self.length))
        return replace(self, k=k, v=v, length=length, tip=Tip(), mark=None)

    def put(self, rows, other: Cache) -> Cache:
        """Return a cache in which these rows are those of `other`."""
        most = max(self.most, other.most)
        mine, theirs = (c.copied(most) for c in (self, other))
        k, v = with_rows(mine.k, rows, theirs.k), with_rows(mine.v, rows, theirs.v)
        length = with_rows(self.length, rows, other.length)
        even = self.even and other.even and self.most == other.most
        return Cache(k, v, length, most, even, scales=self.scales)

    def fork(self) -> Cache:
        """Return another cache with the same contents; both share the buffer until both have appended."""
        return replace(self)

    def tentative(self) -> Cache:
        """Return a fork whose positions do not count as written: the next append overwrites them."""
        mark = None if self.tip.owner is self.mark else object()
        return replace(self, tip=Tip(), mark=mark)


def attention(q, k, v, cache: Cache, lengths=None):
    """Return y b l h e and the next cache: y[i] = sum_{j <= i} softmax_j(q[i] . k[j] / sqrt(e)) v[j]."""
    b, l, h, e = q.shape
    kv = k.shape[2]
    before = cache
    cache = cache.append(k, v, lengths)
    t = before.most + l
    K, V = cache.upto(t, q.dtype)  # b kv t e
    if l == 1:
        mask = None if before.even else visible(before, l, t)
        rows = q.view(b, kv, h // kv, e)
        return F.scaled_dot_product_attention(rows, K, V, attn_mask=mask).view(b, 1, h, e), cache
    q = q.transpose(1, 2)  # b h l e
    first = before.most == 0
    mask = None if first else visible(before, l, t)
    y = F.scaled_dot_product_attention(q, K, V, attn_mask=mask, is_causal=first, enable_gqa=True)
    return y.transpose(1, 2), cache


def visible(before: Cache, l: int, t: int):
    """Return the causal mask b 1 l t, bool."""
    position = before.length[:, None] + torch.arange(l, device=before.length.device)  # b l
    return (torch.arange(t, device=position.device) <= position[..., None])[:, None]

"""The state of a layer, as NumPy arrays that the compiled loops may write in place.

Keys and values lie as b kv t e with room to grow, so that a head's are contiguous and appending copies
nothing but the new ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np


def with_rows(a: np.ndarray, rows, values: np.ndarray) -> np.ndarray:
    """Return a copy of `a` in which these rows have these values."""
    a = a.copy()
    a[rows] = values
    return a


@dataclass(frozen=True)
class Recurrent:
    """The state of a Mamba layer: tail b t c and S b h p n, float32.

    `forked` is shared with every fork: once it holds anything, a write in place copies first.
    """

    tail: np.ndarray
    S: np.ndarray
    forked: list = field(default_factory=list)

    @classmethod
    def empty(cls, cfg, batch: int) -> Recurrent:
        """Return the state of a layer that has read nothing."""
        tail = np.zeros((batch, cfg.conv_kernel - 1, cfg.conv_dim), np.float32)
        S = np.zeros((batch, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size), np.float32)
        return cls(tail, S)

    def take(self, rows) -> Recurrent:
        """Return the states of these rows."""
        rows = np.arange(len(self.S))[rows]  # a slice would give views, and share what is not shared
        return Recurrent(self.tail[rows], self.S[rows])

    def put(self, rows, other: Recurrent) -> Recurrent:
        """Return a state in which these rows are those of `other`."""
        return Recurrent(with_rows(self.tail, rows, other.tail), with_rows(self.S, rows, other.S))

    def fork(self) -> Recurrent:
        """Return a second state of this point, in the same arrays."""
        self.forked.append(True)
        return replace(self)

    def tentative(self) -> Recurrent:
        """Return this state: the verbs do not write in place."""
        return self

    def own(self) -> Recurrent:
        """Return the same state in arrays that may be written."""
        return Recurrent(self.tail.copy(), self.S.copy()) if self.forked else self


class Tip:
    """The last owner of a buffer. Only the state that owns it may append in place."""

    owner: object

    def __init__(self):
        self.owner = self


@dataclass(frozen=True)
class Cache:
    """The first `length[b]` positions of a buffer that forks share; `most` is the longest of them."""

    k: np.ndarray  # b kv t e, room for more positions than are used
    v: np.ndarray
    length: np.ndarray  # b
    most: int = 0
    tip: Tip = field(default_factory=Tip)  # of the buffer, the same in all forks
    mark: object = None  # what tip.owner is while this state stands at the tip

    @classmethod
    def empty(cls, cfg, batch: int) -> Cache:
        """Return the cache of a layer that has read nothing."""
        k, v = (np.zeros((batch, cfg.num_key_value_heads, 0, cfg.head_dim), np.float32) for _ in "kv")
        return cls(k, v, np.zeros(batch, np.int64))

    def append(self, k: np.ndarray, v: np.ndarray, lengths=None) -> Cache:
        """Return the cache with k and v, b l kv e, appended; lengths[b] of the positions are real."""
        added = k.shape[1]
        cache = self.reserve(added)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if (self.length == self.most).all():
            at = slice(self.most, self.most + added)
            cache.k[:, :, at], cache.v[:, :, at] = k, v
        else:
            for row, at in enumerate(self.length):
                cache.k[row, :, at : at + added], cache.v[row, :, at : at + added] = k[row], v[row]
        length = self.length + (added if lengths is None else np.asarray(lengths))
        mark = cache.tip.owner = object()
        return replace(cache, length=length, most=int(length.max(initial=0)), mark=mark)

    def reserve(self, added: int) -> Cache:
        """Return the same cache, with room for more, in a buffer at whose tip it stands."""
        free = self.most + added <= self.k.shape[2] and self.tip.owner is self.mark
        return self if free else self.copied(self.most + added)

    def advanced(self) -> Cache:
        """Return the cache after one more position of every row has been written."""
        self.tip.owner = mark = object()
        return Cache(self.k, self.v, self.length + 1, self.most + 1, self.tip, mark)

    def copied(self, room: int) -> Cache:
        """Return a copy with `room`, and half as much again so that appending stays cheap."""
        b, kv, _, e = self.k.shape
        k, v = (np.zeros((b, kv, max(64, room + room // 2), e), self.k.dtype) for _ in "kv")
        k[:, :, : self.most], v[:, :, : self.most] = self.k[:, :, : self.most], self.v[:, :, : self.most]
        return replace(self, k=k, v=v, tip=Tip(), mark=None)

    def take(self, rows) -> Cache:
        """Return the caches of these rows."""
        rows = np.arange(len(self.length))[rows]
        length = self.length[rows]
        most = int(length.max(initial=0))
        return Cache(self.k[rows], self.v[rows], length, most)

    def put(self, rows, other: Cache) -> Cache:
        """Return a cache in which these rows are those of `other`."""
        most = max(self.most, other.most)
        mine, theirs = self.copied(most), other.copied(most)
        k, v = with_rows(mine.k, rows, theirs.k), with_rows(mine.v, rows, theirs.v)
        return Cache(k, v, with_rows(self.length, rows, other.length), most)

    def fork(self) -> Cache:
        """Return a second state of this point; they share the buffer until both go on."""
        return replace(self)

    def tentative(self) -> Cache:
        """Return a fork whose positions do not count as written: the next append overwrites them."""
        tip = Tip()
        return replace(self, tip=tip, mark=tip.owner if self.tip.owner is self.mark else None)


def new_state(kind: str, cfg, batch: int) -> Recurrent | Cache | None:
    """Return the state of a layer that has read nothing; None for a layer without one."""
    if kind == "M":
        return Recurrent.empty(cfg, batch)
    return Cache.empty(cfg, batch) if kind == "*" else None

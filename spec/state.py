"""Chapter 9. State: all that a layer remembers of a sequence.

    M    the tail of the convolution  b t c   and  S  b h p n         the same size for ever
    *    keys and values              b t kv e  and a length [b]      growing with the sequence
    E -  nothing

A batch is a set of slots: `take(rows)` gives the states of some sequences, `put(rows, other)` sets them,
so sequences join and leave. A state is used once: after a call only the state it returned is valid, so
that a backend may write in place. To go on from one point twice, `fork` it first; a fork costs nothing
here, because S and the tail are never written in place, and keys and values are only ever written beyond
the end of every fork.

A recorded call of several positions leaves the states as they were, and returns a record for each layer: what
the verbs that change its state have read.

    M    x|B|C before the convolution  b l c   and  dt  b l h         about 1 % of a copy of S, a position
    *    keys and values  b l kv e

`commit` applies these verbs again to the first counts[b] positions of each row (chapter 13), for any counts:
speculative decoding reads several guessed tokens in one call and keeps those that were right, without a copy
of S to return to. The call itself reads a `tentative` state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refengine.spec.arrays import Array
from refengine.spec.config import Config
from refengine.spec.numerics import wide


@dataclass(frozen=True)
class Recurrent:
    """The state of a Mamba layer."""

    tail: Array  # b t c: the last conv_kernel - 1 rows of x|B|C before the activation
    S: Array  # b h p n, float32 or wider

    def take(self, rows) -> Recurrent:
        """Return the states of these rows."""
        return Recurrent(self.tail[rows], self.S[rows])

    def put(self, rows, other: Recurrent) -> Recurrent:
        """Return a state in which these rows are those of `other`."""
        return Recurrent(_set(self.tail, rows, other.tail), _set(self.S, rows, other.S))

    def fork(self) -> Recurrent:
        """Return this state: S and the tail are never written in place."""
        return self

    def tentative(self) -> Recurrent:
        """Return this state for a call that must leave it as it is."""
        return self


@dataclass(frozen=True)
class Cache:
    """The state of an attention layer: the first `length[b]` rows of a buffer that forks share.

    `written[b]` is shared with every fork of the buffer. A cache whose length equals `written` appends in
    place; otherwise another fork has appended, so it copies its rows first.
    """

    k: Array  # b t kv e, room for more positions than are used
    v: Array
    length: Array  # b
    written: Array  # b, the same array in all forks

    def append(self, k: Array, v: Array, lengths=None) -> Cache:
        """Return the cache with k and v, b l kv e, appended; lengths[b] of the positions are real."""
        added = k.shape[1]
        cache = self
        room = int(self.length.max(initial=0)) + added
        if room > self.k.shape[1] or not np.array_equal(self.written, self.length):
            cache = self._copied(room)
        slot = np.arange(len(k))[:, None], cache.length[:, None] + np.arange(added)
        cache.k[slot], cache.v[slot] = k, v
        length = cache.length + (added if lengths is None else np.asarray(lengths))
        cache.written[:] = length
        return replace(cache, length=length)

    def upto(self, t: int) -> tuple[Array, Array]:
        """Return the first t positions, b t kv e; rows that are shorter hold anything beyond their length."""
        return self.k[:, :t], self.v[:, :t]

    def take(self, rows) -> Cache:
        """Return the caches of these rows."""
        rows = np.arange(len(self.length))[rows]  # a slice would give views, and share what is not shared
        length = self.length[rows]
        return replace(self, length=length, k=self.k[rows], v=self.v[rows], written=length.copy())

    def put(self, rows, other: Cache) -> Cache:
        """Return a cache in which these rows are those of `other`."""
        room = max(self.k.shape[1], other.k.shape[1])
        mine, theirs = self._copied(room, exactly=True), other._copied(room, exactly=True)
        length = _set(self.length, rows, other.length)
        k, v = _set(mine.k, rows, theirs.k), _set(mine.v, rows, theirs.v)
        return Cache(k, v, length, length.copy())

    def fork(self) -> Cache:
        """Return a second state of this point, which shares the buffer."""
        return replace(self)

    def tentative(self) -> Cache:
        """Return a fork whose positions do not count as written: the next append overwrites them."""
        return replace(self, written=self.written.copy())

    def _copied(self, room: int, exactly: bool = False) -> Cache:
        """Return a copy with `room`, and half as much again so that appending stays cheap."""
        known = int(self.length.max(initial=0))
        shape = (self.k.shape[0], room if exactly else max(64, room + room // 2), *self.k.shape[2:])
        k, v = np.zeros(shape, self.k.dtype), np.zeros(shape, self.v.dtype)
        k[:, :known], v[:, :known] = self.k[:, :known], self.v[:, :known]
        return Cache(k, v, self.length, self.length.copy())


def new_state(kind: str, cfg: Config, batch: int, dtype=np.float32) -> Recurrent | Cache | None:
    """Return the state of a layer that has read nothing; None for a layer without one."""
    if kind == "M":
        tail = np.zeros((batch, cfg.conv_kernel - 1, cfg.conv_dim), dtype)
        S = np.zeros((batch, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size), wide(dtype))
        return Recurrent(tail, S)
    if kind == "*":
        k, v = (np.zeros((batch, 0, cfg.num_key_value_heads, cfg.head_dim), dtype) for _ in range(2))
        return Cache(k, v, np.zeros(batch, np.int64), np.zeros(batch, np.int64))
    return None


def take(states: list, rows) -> list:
    """Return the states of these rows, for all layers of a model at once."""
    return [s and s.take(rows) for s in states]


def put(states: list, rows, others: list) -> list:
    """Return states in which these rows are those of `others`, for all layers."""
    return [s and s.put(rows, o) for s, o in zip(states, others, strict=True)]


def fork(states: list) -> list:
    """Return a second set of states of this point, for all layers."""
    return [s and s.fork() for s in states]


def _set(a: Array, rows, values: Array) -> Array:
    a = a.copy()
    a[rows] = values
    return a

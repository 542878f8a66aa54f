"""Chapter 9. State: the memory that each layer keeps of a sequence.

    M    the tail of the convolution  b t c   and  S  b h p n         of constant size
    *    keys and values              b t kv e  and a length [b]      growing with the sequence (chapter 10)
    E -  nothing

A row is a place in the batch for one sequence. `take(rows)` returns the states of some rows and
`put(rows, other)` sets them, so sequences join and leave. A call consumes the state that it is given: only
the state that it returns may be used afterwards, so that a backend may write in place. To continue twice
from one point, `fork` the state first. A fork costs nothing here, because S and the tail are never written
in place, and keys and values are only written beyond the end of every fork.

A recorded call of several positions leaves the states as they were, and returns a record for each layer: the
inputs of the operations that change its state.

    M    x|B|C before the convolution  b l c   and  dt  b l h         about 1 % of a copy of S, a position
    *    keys and values  b l kv e

`commit` applies these operations again to the first counts[b] positions of each row (chapter 13), for any
counts: speculative decoding reads several guessed tokens in one call and keeps those that were right,
without a copy of S to return to. The call itself reads a `tentative` state.

A state may be stored in fewer bits than it is computed in (chapter 5): keys and values as `Stored` rounds
them, when they are appended; S in float16, rounded up or down at random at the end of each call. The random
numbers are a hash of the sequence's seed, the layer, the position and the element's index in S. So a
sequence is rounded in the same way in any batch. Scores, softmax and the scan stay in float32 or wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from refengine.spec.arrays import Array
from refengine.spec.config import Config
from refengine.spec.numerics import KV_DTYPES, Stored, random_bits, rounding_key, to_half, wide


@dataclass(frozen=True)
class Recurrent:
    """The state of a Mamba layer."""

    tail: Array  # b t c: the last conv_kernel - 1 rows of x|B|C before the activation
    S: Array  # b h p n, float32 or wider; or float16, then with the next two
    key: Array | None = None  # b uint32, hash of seed and layer, for random rounding; no key of attention
    position: Array | None = None  # b, positions read

    def keyed(self, seeds, layer: int) -> Recurrent:
        """Return this state with the rounding keys of sequences with these seeds, in this layer."""
        return self if self.key is None else replace(self, key=rounding_key(seeds, layer))

    def read(self) -> Array:
        """Return S as the scan reads it."""
        return self.S if self.key is None else self.S.astype(wide(self.tail.dtype))

    def after(self, tail: Array, S: Array, count) -> Recurrent:
        """Return the state after `count` more positions, an int or [b], at whose end the scan left S."""
        if self.key is None:
            return Recurrent(tail, S)
        position = self.position + count
        bits = random_bits(self.key, position, math.prod(S.shape[1:])).reshape(S.shape)
        # A number that float16 holds exactly is not changed.
        return Recurrent(tail, to_half(S, bits), self.key, position)

    def take(self, rows) -> Recurrent:
        """Return the states of these rows."""
        return replace(self, **{name: a[rows] for name, a in vars(self).items() if a is not None})

    def put(self, rows, other: Recurrent) -> Recurrent:
        """Return a state in which these rows are those of `other`."""
        mine = {name: a for name, a in vars(self).items() if a is not None}
        return replace(self, **{name: _set(a, rows, getattr(other, name)) for name, a in mine.items()})

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
    stored: Stored | None = None  # None: as computed
    wide: type | np.dtype = np.float32  # in which stored numbers are read

    def scaled(self, k_scale: float, v_scale: float) -> Cache:
        """Return this empty cache with the scales of FP8; itself in any other dtype."""
        return self if self.stored is None else replace(self, stored=self.stored.scaled(k_scale, v_scale))

    def append(self, k: Array, v: Array, lengths=None) -> Cache:
        """Return the cache with k and v, b l kv e, appended; lengths[b] of the positions are real."""
        added = k.shape[1]
        cache = self
        room = int(self.length.max(initial=0)) + added
        if room > self.k.shape[1] or not np.array_equal(self.written, self.length):
            cache = self._copied(room)
        if form := self.stored:
            k, v = form.narrow(k, form.k_scale), form.narrow(v, form.v_scale)
        slot = np.arange(len(k))[:, None], cache.length[:, None] + np.arange(added)
        cache.k[slot], cache.v[slot] = k, v
        length = cache.length + (added if lengths is None else np.asarray(lengths))
        cache.written[:] = length
        return replace(cache, length=length)

    def upto(self, t: int) -> tuple[Array, Array]:
        """Return keys and values of the first t positions, b t kv e; beyond length[b], row b is undefined."""
        k, v = self.k[:, :t], self.v[:, :t]
        if form := self.stored:
            return form.wide(k, form.k_scale, self.wide), form.wide(v, form.v_scale, self.wide)
        return k, v

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
        return replace(self, k=k, v=v, length=length, written=length.copy())

    def fork(self) -> Cache:
        """Return another cache with the same contents and the same buffer; each can be appended to."""
        return replace(self)

    def tentative(self) -> Cache:
        """Return a fork whose positions do not count as written: the next append overwrites them."""
        return replace(self, written=self.written.copy())

    def _copied(self, room: int, exactly: bool = False) -> Cache:
        """Return a copy with `room`, and a sixteenth more so that few appends copy."""
        known = int(self.length.max(initial=0))
        shape = (self.k.shape[0], room if exactly else room + max(64, room // 16), *self.k.shape[2:])
        k, v = np.zeros(shape, self.k.dtype), np.zeros(shape, self.v.dtype)
        k[:, :known], v[:, :known] = self.k[:, :known], self.v[:, :known]
        return replace(self, k=k, v=v, written=self.length.copy())


def new_state(
    kind: str, cfg: Config, batch: int, dtype=np.float32, kv: str | None = None, ssm: str | None = None
) -> Recurrent | Cache | None:
    """Return the state of a layer that has read nothing; None for a layer without one.

    kv, ssm: the dtypes that keys and values, and S, are stored in; None: that of the computation.
    """
    none = np.zeros(batch, np.int64)
    if kind == "M":
        half = ssm == "float16"
        tail = np.zeros((batch, cfg.conv_kernel - 1, cfg.conv_dim), dtype)
        shape = batch, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size
        state = Recurrent(tail, np.zeros(shape, np.float16 if half else wide(dtype)))
        return replace(state, key=rounding_key(none, 0), position=none) if half else state
    if kind == "*":
        form = Stored(KV_DTYPES[kv]) if kv in KV_DTYPES and KV_DTYPES[kv] != dtype else None
        shape = batch, 0, cfg.num_key_value_heads, cfg.head_dim
        k, v = (np.zeros(shape, form.dtype if form else dtype) for _ in "kv")
        return Cache(k, v, none, none.copy(), form, np.dtype(dtype))
    return None


def take(states: list, rows) -> list:
    """Return the states of these rows, for all layers of a model at once."""
    return [s and s.take(rows) for s in states]


def put(states: list, rows, others: list) -> list:
    """Return states in which these rows are those of `others`, for all layers."""
    return [s and s.put(rows, o) for s, o in zip(states, others, strict=True)]


def join(parts: list[list], chosen: list[tuple[int, int]]) -> list:
    """Return states whose row i is row r of parts[p], for all layers, where (p, r) = chosen[i].

    With chosen = [(0, 2), (1, 0)] the result has two rows: row 2 of parts[0], then row 0 of parts[1].
    A kind of state may have a `joined`, which copies each row once; otherwise parts are put one by one.
    """
    return [s and joined([part[layer] for part in parts], chosen) for layer, s in enumerate(parts[0])]


def joined(states: list, chosen: list[tuple[int, int]]):
    """Return the state of one layer whose row i is row r of states[p], where (p, r) = chosen[i]."""
    if hasattr(states[0], "joined"):
        return states[0].joined(states, chosen)
    rows = [[(i, row) for i, (n, row) in enumerate(chosen) if n == part] for part in range(len(states))]
    first = max(range(len(states)), key=lambda part: len(rows[part]))
    at = dict(rows[first])
    found = states[first].take([at.get(i, rows[first][0][1]) for i in range(len(chosen))])
    for part, mine in enumerate(rows):
        if mine and part != first:
            found = found.put([i for i, _ in mine], states[part].take([row for _, row in mine]))
    return found


def fork(states: list) -> list:
    """Return another set of states with the same contents, for all layers; each can be continued."""
    return [s and s.fork() for s in states]


def keyed(states: list, seeds, first: int = 0) -> list:
    """Return states of layers first, first + 1, ... with the rounding keys of their rows' seeds."""
    return [s.keyed(seeds, i) if hasattr(s, "keyed") else s for i, s in enumerate(states, first)]


def _set(a: Array, rows, values: Array) -> Array:
    a = a.copy()
    a[rows] = values
    return a

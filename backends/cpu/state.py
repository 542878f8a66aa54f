"""The state of a layer, as NumPy arrays that the compiled loops may write in place.

Keys and values of a sequence lie in pages of PAGE positions, so a cache grows without a copy and takes no
more memory than its positions. A batch is a list of pages for each sequence, so sequences join and leave
without a copy, and forks share pages. A cache that ends where the page was last written appends in place;
any other cache copies the page first. The first page of a sequence is shorter, and grows by copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from refengine.backends.cpu.arrays import address
from refengine.backends.cpu.interface import filled
from refengine.spec.numerics import FP8, KV_DTYPES, Stored, rounding_key

PAGE = 1920  # positions
FIRST = 64  # of the first page of a sequence; it grows by GROWTH
GROWTH = 4
FULL = Stored(np.dtype(np.float32))
KINDS = {np.dtype(np.float32): 0, KV_DTYPES["bfloat16"]: 2, FP8: 8}  # with the numbers of structures.h


def with_rows(a: np.ndarray, rows, values: np.ndarray) -> np.ndarray:
    """Return a copy of `a` in which these rows have these values."""
    a = a.copy()
    a[rows] = values
    return a


@dataclass(eq=False)
class Row:
    """An array of one sequence. shared: another state reads it too, so it is copied before a write."""

    data: np.ndarray
    shared: bool = False

    def own(self) -> Row:
        """Return this row, or a copy if it is shared."""
        return Row(self.data.copy()) if self.shared else self

    def share(self) -> Row:
        """Mark this row as shared and return it."""
        self.shared = True
        return self


class Rows(Sequence):
    """One array for each sequence of a batch, each in separate memory; together an array b ..

    The result of a verb stays in one array until its rows are requested.
    """

    def __init__(self, whole: np.ndarray | None, rows: tuple[Row, ...] = ()):
        self.whole, self.kept = whole, rows

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return the rows as separate arrays."""
        if self.whole is not None:
            alone = len(self.whole) == 1  # otherwise one row would keep the memory of all
            self.kept = tuple(Row(a if alone else a.copy()) for a in self.whole)
            if self.kept:
                self.whole = None
        return self.kept

    @cached_property
    def addresses(self) -> np.ndarray:
        """Return the address of each row."""
        return np.array([address(row.data) for row in self.rows], np.int64)

    @cached_property
    def place(self) -> int | None:
        """Return a pointer to the addresses."""
        return address(self.addresses)

    def own(self) -> Rows:
        """Return the same rows in writable memory: shared rows are copied."""
        if not any(row.shared for row in self.rows):
            return self
        return Rows(None, tuple(row.own() for row in self.rows))

    def fork(self) -> Rows:
        """Return the same rows, now marked as shared."""
        return self.take(slice(None))

    def take(self, rows) -> Rows:
        """Return some of the rows, now marked as shared."""
        if not len(self):
            return self
        return Rows(None, tuple(self.rows[at].share() for at in np.arange(len(self))[rows]))

    def put(self, rows, other: Rows) -> Rows:
        """Return a copy in which these rows are those of `other`; all are now marked as shared."""
        new = list(self.fork().rows)
        for at, row in zip(np.arange(len(new))[rows], other.fork().rows, strict=True):
            new[at] = row
        return Rows(None, tuple(new))

    @property
    def array(self) -> np.ndarray:
        """Return the rows as one array, a copy if there are several."""
        if self.whole is not None:
            return self.whole
        return self.kept[0].data[None] if len(self.kept) == 1 else np.stack([row.data for row in self.kept])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape as one array."""
        return self.whole.shape if self.whole is not None else (len(self), *self.kept[0].data.shape)

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of all rows."""
        return self.whole.dtype if self.whole is not None else self.kept[0].data.dtype

    @property
    def itemsize(self) -> int:
        """Return the bytes of a number."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Return the bytes of all rows."""
        return math.prod(self.shape) * self.itemsize

    def copy(self) -> np.ndarray:
        """Return a copy as one array."""
        return np.array(self.array)

    def __len__(self) -> int:
        return len(self.whole) if self.whole is not None else len(self.kept)

    def __getitem__(self, at):
        one = self.whole is None and isinstance(at, (int, np.integer))
        return self.kept[at].data if one else self.array[at]

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


@dataclass(frozen=True)
class Recurrent:
    """The state of a Mamba layer: tail b t c and S b h p n, float32; or S in float16, with keys."""

    tail: Rows
    S: Rows
    key: np.ndarray | None = None  # b uint32, for random rounding
    position: np.ndarray | None = None  # b, positions read

    def __post_init__(self):
        for name in ("tail", "S"):
            if not isinstance(a := getattr(self, name), Rows):
                object.__setattr__(self, name, Rows(a))

    @classmethod
    def empty(cls, cfg, batch: int, half: bool = False) -> Recurrent:
        """Return the state of a layer that has read nothing."""
        tail = np.zeros((batch, cfg.conv_kernel - 1, cfg.conv_dim), np.float32)
        shape = batch, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size
        if not half:
            return cls(Rows(tail), Rows(np.zeros(shape, np.float32)))
        none = np.zeros(batch, np.int64)
        return cls(Rows(tail), Rows(np.zeros(shape, np.float16)), rounding_key(none, 0), none)

    def keyed(self, seeds, layer: int) -> Recurrent:
        """Return this state with the rounding keys of sequences with these seeds, in this layer."""
        return self if self.key is None else replace(self, key=rounding_key(seeds, layer))

    def take(self, rows) -> Recurrent:
        """Return the states of these rows."""
        rows = np.arange(len(self.S))[rows]  # a slice would return views of arrays that must not be shared
        more = (a if a is None else a[rows] for a in self.of_float16.values())
        return Recurrent(self.tail.take(rows), self.S.take(rows), *more)

    def put(self, rows, other: Recurrent) -> Recurrent:
        """Return a state in which these rows are those of `other`."""
        theirs = vars(other)
        return Recurrent(
            self.tail.put(rows, other.tail),
            self.S.put(rows, other.S),
            *(a if a is None else with_rows(a, rows, theirs[n]) for n, a in self.of_float16.items()),
        )

    @staticmethod
    def joined(states: list[Recurrent], chosen: list[tuple[int, int]]) -> Recurrent:
        """Return a state whose row i is row r of states[p], where (p, r) = chosen[i]; no row is copied.

        The states lose the chosen rows.
        """
        tail, S = (
            Rows(None, tuple(getattr(states[n], name).rows[row] for n, row in chosen))
            for name in ("tail", "S")
        )
        if len(set(chosen)) < len(chosen):
            tail, S = tail.fork(), S.fork()
        if states[0].key is None:
            return Recurrent(tail, S)
        key, position = (
            np.array([getattr(states[n], name)[row] for n, row in chosen]) for name in states[0].of_float16
        )
        return Recurrent(tail, S, key, position)

    @property
    def of_float16(self) -> dict[str, np.ndarray | None]:
        """Return the arrays that only a state in float16 has, by name."""
        return {"key": self.key, "position": self.position}

    def read(self) -> np.ndarray | Recurrent:
        """Return S as the scan reads it: the state itself where S is float16."""
        return self.S.array if self.key is None else self

    def after(self, tail: Any, S: Any, count=1) -> Recurrent:
        """Return the state after `count` more positions, an int or [b], at whose end the scan left S."""
        return Recurrent(tail, S, self.key, None if self.position is None else self.position + count)

    def advanced(self, count=1) -> Recurrent:
        """Return the state after `count` more positions, which were read in place."""
        return self if self.position is None else replace(self, position=self.position + count)

    def fork(self) -> Recurrent:
        """Return another state with the same contents, in the same arrays."""
        return replace(self, tail=self.tail.fork(), S=self.S.fork())

    def tentative(self) -> Recurrent:
        """Return this state: the verbs do not write in place."""
        return self

    def own(self) -> Recurrent:
        """Return the same state in writable arrays."""
        tail, S = self.tail.own(), self.S.own()
        return self if tail is self.tail and S is self.S else replace(self, tail=tail, S=S)


@dataclass(eq=False)
class Page:
    """Keys and values of a run of positions of one sequence: data 2 kv t e, of which `written` are in use."""

    data: np.ndarray
    written: int = 0

    @property
    def room(self) -> int:
        """Return the number of positions that fit into the page."""
        return self.data.shape[2]

    def copied(self, used: int, room: int) -> Page:
        """Return a page with `room` positions, and a copy of the first `used` positions of this one."""
        _, kv, _, e = self.data.shape
        data = np.empty((2, kv, room, e), self.data.dtype)
        data[:, :, :used] = self.data[:, :, :used]
        return Page(data, used)


@dataclass(frozen=True)
class Cache:
    """Keys and values of each row: `length[b]` positions in its pages.

    lasting: whether appended positions count as written. If not, the next append overwrites them; a tentative
    call uses such a cache.
    """

    stored: Stored
    heads: tuple[int, int]  # kv e
    pages: tuple[tuple[Page, ...], ...]
    length: np.ndarray  # b
    lasting: bool = True

    @classmethod
    def empty(cls, cfg, batch: int, stored: Stored) -> Cache:
        """Return the cache of a layer that has read nothing."""
        heads = cfg.num_key_value_heads, cfg.head_dim
        return cls(stored, heads, ((),) * batch, np.zeros(batch, np.int64))

    @property
    def most(self) -> int:
        """Return the length of the longest row."""
        return int(self.length.max(initial=0))

    @property
    def k(self) -> Gathered:
        """Return the keys as one array."""
        return Gathered(self, 0)

    @property
    def v(self) -> Gathered:
        """Return the values as one array."""
        return Gathered(self, 1)

    def scaled(self, k_scale: float, v_scale: float) -> Cache:
        """Return this empty cache with the scales of FP8; the same in any other dtype."""
        return replace(self, stored=self.stored.scaled(k_scale, v_scale))

    @cached_property
    def structure(self):
        """Return the structure Cache for the loops; it is valid as long as the pages."""
        count = max(1, *map(len, self.pages)) if self.pages else 1
        table = np.zeros((len(self.pages), count, 3), np.int64)  # structures Page
        for row, pages in zip(table, self.pages, strict=True):
            row[: len(pages)] = [
                (at := address(page.data), at + page.data.nbytes // 2, page.room * self.heads[1])
                for page in pages
            ] or 0
        made = filled(
            "Cache",
            address(table),
            count,
            PAGE,
            KINDS[self.stored.dtype],
            self.stored.k_scale,
            self.stored.v_scale,
        )
        made.table = table  # kept alive
        return made

    def append(self, k: np.ndarray, v: np.ndarray, lengths=None) -> Cache:
        """Return the cache with k and v, b l kv e, appended; lengths[b] of the positions are real.

        The others are written too, since queries of the same call read them.
        """
        more = k.shape[1]
        cache = self.reserve(more)
        for which, (x, scale) in enumerate(((k, self.stored.k_scale), (v, self.stored.v_scale))):
            x = self.stored.narrow(np.asarray(x), scale).swapaxes(1, 2)  # b kv l e
            for row, (pages, at) in enumerate(zip(cache.pages, self.length.tolist(), strict=True)):
                done = 0
                while done < more:
                    page, start = pages[(at + done) // PAGE], (at + done) % PAGE
                    here = min(more - done, PAGE - start)
                    page.data[which, :, start : start + here] = x[row, :, done : done + here]
                    done += here
        return cache.advanced(more if lengths is None else np.asarray(lengths))

    def reserve(self, more: int) -> Cache:
        """Return the same cache, with room for `more` positions of each row that no other row shares."""
        rows, taken, changed = list(self.pages), set[int](), False
        for row, (pages, length) in enumerate(zip(self.pages, self.length.tolist(), strict=True)):
            used = length - (len(pages) - 1) * PAGE  # in the last page
            if (
                not pages
                or self.stale(pages[-1], used)
                or used + more > pages[-1].room
                or id(pages[-1]) in taken
            ):
                rows[row] = pages = self.with_room(pages, length, more, taken)
                changed = True
            taken.update(map(id, pages[-1:]))
        return replace(self, pages=tuple(rows)) if changed else self

    def stale(self, page: Page, used: int) -> bool:
        """Return whether the page holds positions after the first `used` that this cache must not overwrite.

        Positions that do not count as written belong to one cache at a time, so a page may also hold fewer.
        """
        return page.written > used or (self.lasting and page.written < used)

    def with_room(self, pages: tuple[Page, ...], length: int, more: int, taken: set[int]) -> tuple[Page, ...]:
        """Return the pages of a row with room for `more`; copy a last page that another cache wrote to."""
        pages = pages[: -(-length // PAGE)]
        used = length - (len(pages) - 1) * PAGE
        if pages and used < PAGE:
            last, needed = pages[-1], min(PAGE, used + more)
            if self.stale(last, used) or needed > last.room or id(last) in taken:
                pages = (*pages[:-1], last.copied(used, self.room(len(pages) - 1, needed)))
            taken.add(id(pages[-1]))
        while len(pages) * PAGE < length + more:
            size = self.room(len(pages), length + more - len(pages) * PAGE)
            pages = (*pages, Page(np.empty((2, self.heads[0], size, self.heads[1]), self.stored.dtype)))
        return pages

    def room(self, index: int, needed: int) -> int:
        """Return the number of positions of a new page, number `index` of its row."""
        if index:
            return PAGE
        room = FIRST
        while room < needed:
            room *= GROWTH
        return min(PAGE, room)

    def advanced(self, count=1) -> Cache:
        """Return the cache after `count` more positions of every row, an int or [b], have been written."""
        length = self.length + count
        if self.lasting:
            for pages, end in zip(self.pages, length.tolist(), strict=True):
                for index in range(len(pages) - 1, -1, -1):
                    used = min(PAGE, max(0, end - index * PAGE))
                    if pages[index].written == used:
                        break
                    pages[index].written = used
        after = replace(self, length=length)
        if "structure" in vars(self):
            vars(after)["structure"] = self.structure  # of the same pages
        return after

    def take(self, rows) -> Cache:
        """Return the caches of these rows."""
        rows = np.arange(len(self.length))[rows]
        return replace(self, pages=tuple(self.pages[row] for row in rows), length=self.length[rows])

    def put(self, rows, other: Cache) -> Cache:
        """Return a cache in which these rows are those of `other`."""
        pages = list(self.pages)
        for row, theirs in zip(np.arange(len(pages))[rows], other.pages, strict=True):
            pages[row] = theirs
        return replace(self, pages=tuple(pages), length=with_rows(self.length, rows, other.length))

    @staticmethod
    def joined(states: list[Cache], chosen: list[tuple[int, int]]) -> Cache:
        """Return a cache whose row i is row r of states[p], where (p, r) = chosen[i]."""
        pages = tuple(states[n].pages[row] for n, row in chosen)
        return replace(states[0], pages=pages, length=np.array([states[n].length[row] for n, row in chosen]))

    def fork(self) -> Cache:
        """Return another cache with the same contents; both share pages until each has appended."""
        return replace(self)

    def tentative(self) -> Cache:
        """Return a fork whose positions do not count as written: the next append overwrites them."""
        found = replace(self, lasting=False)
        if "structure" in vars(self):
            vars(found)["structure"] = self.structure
        return found


class Gathered(Sequence):
    """Keys or values as an array b kv t e in the dtype of the cache; zeros beyond a row's length."""

    def __init__(self, cache: Cache, which: int):
        self.cache, self.which, self.dtype = cache, which, cache.stored.dtype
        self.shape = len(cache.length), cache.heads[0], cache.most, cache.heads[1]
        self.itemsize = self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, at):
        row, heads, positions = at if isinstance(at, tuple) else (at, slice(None), slice(None))
        start, stop, step = positions.indices(self.shape[2])
        out = np.zeros((self.shape[1], max(0, stop - start), self.shape[3]), self.dtype)
        end = min(stop, int(self.cache.length[row]))
        for index in range(start // PAGE, -(-end // PAGE)):
            first, last = max(start, index * PAGE), min(end, (index + 1) * PAGE)
            page = self.cache.pages[row][index].data[self.which]
            out[:, first - start : last - start] = page[:, first - index * PAGE : last - index * PAGE]
        return out[heads, ::step]

    def __array__(self, dtype=None, copy=None):
        found = np.zeros(self.shape, self.dtype)
        for row in range(len(self)):
            found[row] = self[row]
        return found if dtype is None else found.astype(dtype)


def new_state(
    kind: str, cfg, batch: int, stored: Stored = FULL, half: bool = False
) -> Recurrent | Cache | None:
    """Return the state of a layer that has read nothing; None for a layer without one. half: S in float16."""
    if kind == "M":
        return Recurrent.empty(cfg, batch, half)
    return Cache.empty(cfg, batch, stored) if kind == "*" else None

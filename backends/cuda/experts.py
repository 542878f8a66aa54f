"""The experts: few tokens each by its own matrices, many sorted by expert so that each matrix is read once.

A routing is (expert b l k int32, weight b l k float32), as layers.route leaves it. Placed experts are two
stacks. An expert-parallel rank holds the experts first .. first + count - 1: what was chosen outside of them
adds nothing here, and the ranks' results are summed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refengine.backends.cuda.array import DeviceArray
from refengine.backends.cuda.verbs import Verbs, rows, tiles
from refengine.spec.config import InputError

CHOICES, EXPERTS = 1024, 1024  # limits and sizes of experts_sort.cu
COLUMNS = {16: {4: 128, 2: 128}, 64: {4: 128, 2: 256}}  # of experts_grouped.cu, by rows and bytes of a Real
STAGES, STAGE_BYTES = {4: 3, 2: 4}, {4: 144, 2: 64}  # and how many stages; bytes of a row in one
ROWS, WARPS, SLOTS = 4, 4, 64  # of experts_decode.cu
TURN = 12  # warps of experts_down_few, at most: all of them take as many slots, or one less
FEW = 8  # up to so many tokens hardly two share an expert
MANY = 24  # from so many choices an expert on, tiles of 64 are filled well enough
SPAN = 1 << 17  # choices at a time: what lies between up and down takes memory


class Stacked(NamedTuple):
    """All experts that are held here."""

    up: DeviceArray  # count i x
    down: DeviceArray  # count x i


class Experts(Verbs):
    """The verb experts."""

    def experts(self, u, experts: Stacked, routing, first: int = 0):
        """Return u b l x -> the sum over the chosen of  weight relu(u up')^2 down'."""
        count, k, x = len(experts.up), routing.expert.shape[-1], u.shape[-1]
        if k > SLOTS or count > EXPERTS:
            raise InputError(
                f"the cuda backend supports at most {SLOTS} of {EXPERTS} experts a token, not {k} of {count}"
            )
        y = self.device.empty(u.shape, self.dtype)
        (u, _), out = rows(u), y.reshape(-1, x)
        expert, weight = routing.expert.reshape(-1, k), routing.weight.reshape(-1, k)
        tokens = len(u)
        if tokens <= FEW:
            self.few(u, experts, expert, weight, out, first)
            return y
        for begin in range(0, tokens, SPAN // k):
            part = slice(begin, begin + SPAN // k)
            self.many(u[part], experts, expert[part], weight[part], out[part], first)
        return y

    def few(self, u, experts: Stacked, expert, weight, y, first: int):
        """Fill y for few tokens: each choice reads its expert."""
        (tokens, k), (count, i, x) = expert.shape, experts.up.shape
        middle = self.device.empty((tokens * k, i), self.dtype)
        held = np.int32(k), np.int32(first), np.int32(count)
        args: tuple = u, np.int64(u.strides[0]), experts.up, expert, middle, *held, np.int32(i), np.int32(x)
        grid = tiles(i, ROWS * WARPS), tokens * k
        self.launch("experts_decode", "experts_up_few", grid, 32 * WARPS, *args)
        args = middle, experts.down, expert, weight, y, *held, np.int32(x), np.int32(i)
        turns = tiles(k, TURN)
        block = 32 * tiles(k, turns)
        self.launch("experts_decode", "experts_down_few", (tiles(x, ROWS), tokens), block, *args)

    def many(self, u, experts: Stacked, expert, weight, y, first: int):
        """Fill y for many tokens, sorted by expert, so that each expert is read once a tile."""
        (tokens, k), (count, i, x) = expert.shape, experts.up.shape
        choices = tokens * k
        rows = 64 if choices >= MANY * count else 16
        order, place, pieces = self.sorted(expert.reshape(-1), first, count, rows)
        columns = COLUMNS[rows][self.size]
        shared = STAGES[self.size] * (rows + columns) * STAGE_BYTES[self.size]
        middle, out = (self.device.empty((choices, width), self.dtype) for width in (i, x))
        grid = tiles(i, columns), len(pieces)
        args: tuple = u, np.int64(u.strides[0]), experts.up, order, pieces, middle, *map(np.int32, (k, x, i))
        self.launch("experts_grouped", f"experts_up_{rows}", grid, 128, *args, shared_bytes=shared)
        grid = tiles(x, columns), len(pieces)
        args = middle, experts.down, pieces, out, np.int32(i), np.int32(x)
        self.launch("experts_grouped", f"experts_down_{rows}", grid, 128, *args, shared_bytes=shared)
        grid = tokens, tiles(x, 128 * 16 // self.size)
        self.launch("experts_sum", "experts_sum", grid, 128, out, place, weight, y, np.int32(k), np.int32(x))

    def sorted(self, expert, first: int, count: int, rows: int):
        """Return the choices by expert, the place of each, and the tiles of at most `rows` of one expert."""
        choices, device = len(expert), self.device
        warps, room = tiles(choices, CHOICES), choices // rows + min(count, choices)
        counts = device.empty((warps, count), "int32")
        order, place = (device.empty((choices,), "int32") for _ in "op")
        pieces = device.empty((room, 3), "int32")
        which = np.int32(choices), np.int32(first), np.int32(count)
        begin, shared = (expert, counts, *which), 4 * count
        self.launch("experts_sort", "experts_count", (warps,), 32, *begin, shared_bytes=shared)
        sizes = map(np.int32, (warps, count, rows, room))
        self.launch("experts_sort", "experts_offsets", (1,), 32 * tiles(count, 32), counts, pieces, *sizes)
        args = expert, counts, order, place, *which
        self.launch("experts_sort", "experts_order", (warps,), 32, *args, shared_bytes=shared)
        return order, place, pieces

"""The state-space scan: few positions by the recurrence, more by chunks, whose products go side by side.

Letters and equations are those of spec/scan.py. A step of decoding, or of a few drafted tokens, is one
kernel, which reads and writes the state once. A longer call is four: what each chunk adds to the state, the
state before each chunk, C B' of each group of heads, the outputs. Sums of dt A are as exact as in float64.
The state is changed in place. One that is readonly stays: a step does not write it, a longer call changes a
copy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from refengine.backends.cuda.array import DeviceArray
from refengine.backends.cuda.verbs import Verbs, rows, tiles

CHUNK, TILE, THREADS, PAIRS = 128, 64, 128, 3  # of ssd.cuh
FEW = 16  # positions that are faster one after another than as a chunk
STEP_ROWS = 16  # rows of a head's state that a block of ssd_step takes
SCRATCH = 1 << 28  # bytes between kernels, unless a chunk takes more; more chunks than that take turns


class Half(NamedTuple):
    """S in float16, the keys [b] of its random rounding, and the positions read [b], which the scan moves."""

    S: DeviceArray
    key: DeviceArray
    position: DeviceArray


class Scan(Verbs):
    """The verb ssd_scan. STATE_F16 among the defines: S is float16, and given as a Half."""

    def __init__(self, device, defines: tuple[str, ...] = ()):
        super().__init__(device, defines)
        self.activations = tuple(name for name in defines if name == "REAL_BF16")

    def run(self, file: str, grid, *args, held: int = 0, stays: bool = False):
        """Launch the kernel of a file that has one; a block holds so many tiles in shared memory.

        Only two of them know the state as it is stored.
        """
        defines = self.defines if file in ("ssd_step", "ssd_pass") else self.activations
        row = CHUNK + (0 if self.dtype == "bfloat16" else 4)  # see tiles.cuh
        defines = (*defines, "STAYS") if stays else defines
        shared = held * TILE * row * self.size
        self.device.launch(file, file, grid, (THREADS,), args, shared, defines)

    def ssd_scan(
        self, x, dt, A_log, B, C, D, dt_bias, S, lengths=None, dt_limit=(0.0, math.inf), chunk: int = 128
    ):
        """Returns (y b l h p, the state after the last real position of each row).

        `chunk` is that of the definition; here it is always CHUNK, which changes nothing but the rounding.
        """
        y = self.device.empty(x.shape, self.dtype)
        S, *random = S if isinstance(S, Half) else (S, None, None)
        dt_limit = [np.float32(bound) for bound in dt_limit]
        if S.readonly and not (x.shape[1] <= FEW and S.dtype == "float32" and in_registers(S, B, C)):
            S = S.copy()
        if x.shape[1] <= FEW:
            self.steps(x, dt, A_log, B, C, D, dt_bias, S, random, lengths, dt_limit, y)
        else:
            length, span = x.shape[1], CHUNK * chunks_at_once(x.shape, B.shape, self.size)
            for first in range(0, length, span):
                last = min(length, first + span)
                self.chunks(x, dt, A_log, B, C, D, dt_bias, S, random, lengths, dt_limit, y, first, last)
        if random[1] is not None and not random[1].readonly:
            b, length = np.int32(len(S)), np.int32(x.shape[1])
            args, grid = (random[1], lengths, length, b), (tiles(len(S), 128),)
            self.device.launch("attention", "attention_advance", grid, (128,), args, 0, self.activations)
        return y, S

    def steps(self, x, dt, A_log, B, C, D, dt_bias, S, random, lengths, dt_limit, y):
        """Fill y and change S by the recurrence, for a few positions of each row."""
        (b, length, h, p), (g, state) = x.shape, B.shape[2:]
        grid = tiles(p, STEP_ROWS), h, b
        (x, x_stride), (dt, dt_stride), (B, B_stride), (C, C_stride) = map(positions, (x, dt, B, C))
        self.run(
            "ssd_step",
            grid,
            x,
            dt,
            A_log,
            B,
            C,
            D,
            dt_bias,
            S,
            y,
            lengths,
            *random,
            *map(np.int32, (length, h, p, g, state)),
            x_stride,
            dt_stride,
            B_stride,
            C_stride,
            *dt_limit,
            stays=S.readonly,
        )

    def chunks(self, x, dt, A_log, B, C, D, dt_bias, S, random, lengths, dt_limit, y, first: int, last: int):
        """Fill y and change S for positions first .. last - 1 of each row, all chunks at once."""
        (b, length, h, p), (g, state) = x.shape, B.shape[2:]
        chunks, heads = tiles(last - first, CHUNK), h * tiles(p, TILE)
        step, high, low = (self.device.empty((b, h, chunks * CHUNK), "float32") for _ in range(3))
        decay = self.device.empty((b, h, chunks), "float32")
        added = self.device.empty((b, chunks, h, p, state), "float32")
        before = self.device.empty((b, chunks, h, p, state), self.dtype)
        scores = self.device.empty((b, chunks, g, PAIRS, TILE, TILE), "float32")
        sizes = tuple(map(np.int32, (first, length, h, p, g, state)))
        (x, x_stride), (dt, dt_stride), (B, B_stride), (C, C_stride) = map(positions, (x, dt, B, C))
        self.run(
            "ssd_states",
            (chunks, heads, b),
            x,
            dt,
            A_log,
            B,
            dt_bias,
            step,
            high,
            low,
            decay,
            added,
            lengths,
            *sizes,
            x_stride,
            dt_stride,
            B_stride,
            *dt_limit,
            held=2 if self.dtype == "float32" else 3,
        )
        grid = tiles(p * state, 4 * THREADS), h, b
        counts = map(np.int32, (last, chunks, h, p * state))
        self.run("ssd_pass", grid, S, decay, added, before, *random, lengths, *counts)
        self.run(
            "ssd_scores",
            (chunks * PAIRS, g, b),
            B,
            C,
            scores,
            lengths,
            *map(np.int32, (first, length, g, state)),
            B_stride,
            C_stride,
            held=2,
        )
        self.run(
            "ssd_outputs",
            (tiles(last - first, TILE), heads, b),
            x,
            C,
            D,
            step,
            high,
            low,
            before,
            scores,
            y,
            lengths,
            *sizes,
            x_stride,
            C_stride,
            held=2,
        )


def chunks_at_once(x: tuple[int, ...], B: tuple[int, ...], size: int) -> int:
    """Return how many chunks of x b l h p and B b l g n share the scratch; `size`: bytes of an activation."""
    (b, _, h, p), (g, n) = x, B[2:]
    states, steps, scores = h * p * n * (4 + size), 4 * (3 * CHUNK + 1) * h, 4 * g * PAIRS * TILE**2
    return max(1, SCRATCH // (b * (states + steps + scores)))


def in_registers(S, B, C) -> bool:
    """Return whether a warp of ssd_step keeps its rows of S from one position to the next."""
    state, arrays = S.shape[-1], (S, positions(B)[0], positions(C)[0])
    places = (bytes for a in arrays for bytes in (a.pointer, state * a.itemsize, a.strides[0] * a.itemsize))
    return state <= (32 if any(place % 16 for place in places) else 128)


def positions(x):
    """Return x [b, l, ..] as a row for each position."""
    b, length = x.shape[:2]
    return rows(x.reshape(b, length, math.prod(x.shape[2:])))

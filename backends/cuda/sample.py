"""Tokens: the first vectors from their ids, and from the last numbers the few ids worth choosing from."""

from __future__ import annotations

import numpy as np

from refengine.backends.cuda.verbs import Verbs, tiles
from refengine.spec.config import InputError

WIDTH = 1024  # of candidates.cu
CANDIDATES = WIDTH // 2  # at most: each round halves what is left, or better


class Tokens(Verbs):
    """The verb embed, and the likeliest of the verb logits."""

    def embed(self, ids, table):
        """Rows of the table v d: ids int32 of any shape -> [.., d]. An id outside the table gives NaN."""
        v, d = table.shape
        x = self.device.empty((*ids.shape, d), self.dtype)
        if ids.size:
            args = ids.packed(), table, x, np.int32(v), np.int32(d)
            self.launch("embed", "embed", (ids.size,), min(256, 32 * tiles(d, 128)), *args)
        return x

    def candidates(self, logits, k: int):
        """The k largest of each row of logits [r, v], and their ids: two arrays [r, k], the largest first.

        Of equal ones the lowest id comes first, and NaN before everything.
        """
        (rows, width), k = logits.shape, min(k, logits.shape[1])
        if not 1 <= k <= CANDIDATES:
            raise InputError(f"the CUDA backend finds 1 to {CANDIDATES} candidates, not {k}")
        best, count, kernel = logits.packed(), width, "candidates_begin"
        while kernel == "candidates_begin" or count > k:
            pieces = tiles(count, WIDTH)
            keys = self.device.empty((rows, pieces, k), "int64")
            self.choose(kernel, (pieces, rows), best, keys, np.int32(count), np.int32(k))
            best, count, kernel = keys, pieces * k, "candidates_next"
        value, index = self.device.empty((rows, k), "float32"), self.device.empty((rows, k), "int32")
        self.choose("candidates_end", (tiles(rows * k, 256),), best, value, index, np.int32(rows * k))
        return value, index

    def choose(self, kernel: str, grid, *args):
        """Logits are float32 in every build, so that there is one of these kernels."""
        self.device.launch("candidates", kernel, grid, (256,), args)

    def argmax(self, logits):
        """The id of the largest of each row: logits [r, v] -> int32 [r]."""
        return self.candidates(logits, 1)[1].reshape(-1)

"""Embedding: the first vectors, from token ids."""

from __future__ import annotations

import numpy as np

from refengine.backends.cuda.verbs import Verbs, tiles


class Embedding(Verbs):
    """The verb embed."""

    def embed(self, ids, table):
        """Return rows of the table v d: ids int32 of any shape -> [.., d]. An id outside it gives NaN."""
        v, d = table.shape
        x = self.device.empty((*ids.shape, d), self.dtype)
        if ids.size:
            args = ids.packed(), table, x, np.int32(v), np.int32(d)
            self.launch("embed", "embed", (ids.size,), min(256, 32 * tiles(d, 128)), *args)
        return x

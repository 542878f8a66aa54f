"""Experts where they lie, perhaps in a memory map, and their addresses for the compiled loops."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refengine.backends.cpu.arrays import address, in_order, kind_of


class Listed(NamedTuple):
    """Experts as matrices of any array library."""

    matrices: list  # (up, down) of each
    up: np.ndarray  # E addresses
    down: np.ndarray
    kind: int | None  # of all the matrices; None: the loops cannot read them

    @classmethod
    def of(cls, up: list, down: list) -> Listed:
        """Return the experts of these matrices."""
        kinds = {kind_of(m) if in_order(m) else None for m in [*up, *down]}
        first, second = (np.array([address(m) for m in part], np.int64) for part in (up, down))
        return cls(list(zip(up, down, strict=True)), first, second, kinds.pop() if len(kinds) == 1 else None)

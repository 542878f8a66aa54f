"""Experts in place, perhaps in a memory map, as structures for the compiled loops."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from refengine.backends.cpu.arrays import matrix
from refengine.backends.cpu.interface import STRUCTURES


class Listed(NamedTuple):
    """Experts as matrices of any array library, or packed.

    matrices  (up, down) of each
    up, down  E structures Matrix; None if the loops cannot read them
    """

    matrices: list
    up: Any
    down: Any

    @classmethod
    def of(cls, up: list, down: list) -> Listed:
        """Return the experts of these matrices; readable if all up, and all down, are of one kind."""
        try:
            parts = [[matrix(m) for m in part] for part in (up, down)]
        except TypeError:
            parts = []
        readable = parts and all(len({m.kind for m in part}) <= 1 for part in parts)
        arrays = [(STRUCTURES["Matrix"] * len(part))(*part) for part in parts] if readable else [None, None]
        return cls(list(zip(up, down, strict=True)), *arrays)

    @property
    def readable(self) -> bool:
        """Return whether the loops can read the experts."""
        return self.up is not None

    @property
    def places(self) -> tuple[int, int]:
        """Return the addresses of the structures."""
        return ctypes.addressof(self.up), ctypes.addressof(self.down)

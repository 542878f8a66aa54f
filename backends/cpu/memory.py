"""Memory of results: what one array no longer needs is kept for the next.

The system clears fresh memory, a page at a time, when it is first written. For a large array that can take
as long as the work on it.
"""

from __future__ import annotations

import math
from threading import Lock

import numpy as np

LARGE = 2**14  # numbers from which an array is worth keeping
MOST = 2**24  # numbers that are kept, at most


class Kept:
    """Memory for reuse, the latest last."""

    def __init__(self, most: int = MOST):
        self.most, self.size = most, 0
        self.free: list[np.ndarray] = []
        self.lock = Lock()

    def take(self, count: int) -> np.ndarray:
        """Return memory for `count` numbers, used before or fresh; at most twice what is needed."""
        with self.lock:
            for i in reversed(range(len(self.free))):
                if count <= self.free[i].size <= 2 * count:
                    self.size -= self.free[i].size
                    return self.free.pop(i)
        return np.empty(count, np.float32)

    def give(self, memory: np.ndarray) -> None:
        """Keep memory that nothing uses any longer, in place of the oldest where that is too much."""
        with self.lock:
            self.free.append(memory)
            self.size += memory.size
            while self.size > self.most:
                self.size -= self.free.pop(0).size


KEPT = Kept()


class Lent:
    """Owns the memory of an array and its views, and gives it back when the last of them is gone."""

    def __init__(self, memory: np.ndarray, kept: Kept):
        self.memory, self.kept = memory, kept
        self.__array_interface__ = memory.__array_interface__

    def __del__(self):
        self.kept.give(self.memory)


def empty(shape: tuple[int, ...], kept: Kept = KEPT) -> np.ndarray:
    """Return a new array of float32, whose numbers are undefined."""
    count = math.prod(shape)
    if count < LARGE:
        return np.empty(shape, np.float32)
    return np.asarray(Lent(kept.take(count), kept))[:count].reshape(shape)

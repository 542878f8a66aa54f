"""Reuse the memory of results: the buffer of a freed array is kept for the next one.

The system clears fresh memory, a page at a time, when it is first written. For a large array that can take
as long as the computation.
"""

from __future__ import annotations

import math
from threading import Lock

import numpy as np

LARGE = 2**14  # numbers of the smallest array that is kept
MOST = 2**24  # most numbers that are kept


class Kept:
    """Buffers for reuse; the latest is the last."""

    def __init__(self, most: int = MOST):
        self.most, self.size = most, 0
        self.free: list[np.ndarray] = []
        self.lock = Lock()

    def take(self, count: int) -> np.ndarray:
        """Return memory for `count` numbers, reused (at most twice the size) or fresh."""
        with self.lock:
            for i in reversed(range(len(self.free))):
                if count <= self.free[i].size <= 2 * count:
                    self.size -= self.free[i].size
                    return self.free.pop(i)
        return np.empty(count, np.float32)

    def give(self, memory: np.ndarray) -> None:
        """Keep unused memory; drop the oldest buffers if it is too much.

        The garbage collector may call this in a thread that holds the lock: then the memory is freed.
        """
        if not self.lock.acquire(blocking=False):
            return
        try:
            self.free.append(memory)
            self.size += memory.size
            while self.size > self.most:
                self.size -= self.free.pop(0).size
        finally:
            self.lock.release()


KEPT = Kept()


class Lent:
    """Owns the memory of an array and its views, and returns it when the last of them is freed."""

    def __init__(self, memory: np.ndarray, kept: Kept):
        self.memory, self.kept = memory, kept
        self.__array_interface__ = memory.__array_interface__

    def __del__(self):
        self.kept.give(self.memory)


def empty(shape: tuple[int, ...], kept: Kept = KEPT) -> np.ndarray:
    """Return a new float32 array with undefined contents."""
    count = math.prod(shape)
    if count < LARGE:
        return np.empty(shape, np.float32)
    return np.asarray(Lent(kept.take(count), kept))[:count].reshape(shape)

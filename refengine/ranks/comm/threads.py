"""Ranks as threads of one process: each ordered pair of ranks has a queue of messages."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Queue
from threading import Event
from time import monotonic
from typing import Any

from refengine.ranks.comm import TIMEOUT, RankError, Ranks, memory


class Threads(Ranks):
    """Connect one rank that `on_each` starts; `stop` is set when any rank raises."""

    name = "threads"

    def __init__(self, rank: int, count: int, timeout: float, queues: dict, stop: Event):
        super().__init__(rank, count, timeout)
        self.queues, self.stop = queues, stop

    def exchange(self, out, into, idle=False):
        """Put `out` into the queues, then fill `into` from them; RankError after the timeout."""
        for peer, x in out.items():
            self.post(x, peer)
        until = monotonic() + self.timeout
        for peer, x in into.items():
            memory(x)[:] = self._next(peer, None if idle else until)

    def post(self, x, to):
        """Put a copy of `x` into the queue to the rank `to`."""
        self.queues[self.rank, to].put(memory(x).copy())

    def _next(self, peer: int, until: float | None):
        while True:
            try:
                return self.queues[peer, self.rank].get(timeout=0.05)
            except Empty:
                if self.stop.is_set():
                    raise self.connection_lost(peer) from None
                if until is not None and monotonic() > until:
                    raise self.timed_out([peer]) from None


def on_each(count: int, work: Callable[[Threads], Any], timeout: float = TIMEOUT) -> list:
    """Return work(comm) of each rank, run at the same time; raises the error that caused the others."""
    queues: dict[tuple[int, int], Queue] = {(a, b): Queue() for a in range(count) for b in range(count)}
    stop = Event()

    def one(rank: int):
        try:
            return work(Threads(rank, count, timeout, queues, stop))
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(one, rank) for rank in range(count)]
    if errors := [error for job in jobs if (error := job.exception())]:
        raise next((error for error in errors if not isinstance(error, RankError)), errors[0])
    return [job.result() for job in jobs]

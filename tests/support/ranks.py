"""Ranks as threads of one process, and what each of them said."""

from __future__ import annotations

from collections.abc import Callable

from refengine.ranks.comm.threads import Threads, on_each


class Overheard:
    """A Comm that lists what it took part in: (verb, peers, values of an array)."""

    def __init__(self, comm: Threads):
        self.comm, self.rank, self.said = comm, comm.rank, []

    def sum(self, x, peers):
        self.said.append(("sum", peers, x.size))
        return self.comm.sum(x, peers)

    def gather(self, x, peers, sizes, axis):
        self.said.append(("gather", peers, x.size))
        return self.comm.gather(x, peers, sizes, axis)

    def scatter(self, x, peers, sizes):
        self.said.append(("scatter", peers, x.size))
        return self.comm.scatter(x, peers, sizes)

    def send(self, x, to):
        self.said.append(("send", (self.rank, to), x.size))
        self.comm.send(x, to)

    def receive(self, source, like):
        return self.comm.receive(source, like)


def overheard(count: int, work: Callable) -> list:
    """work(comm) of every rank, at the same time."""
    return on_each(count, lambda comm: work(Overheard(comm)))

"""Ranks as threads of one process, and what each of them said."""

from __future__ import annotations

from collections.abc import Callable

from refengine.ranks.comm.threads import Threads, on_each


class Overheard:
    """A Comm that lists what it took part in: (verb, peers, values of an array)."""

    def __init__(self, comm: Threads):
        self.comm, self.rank, self.said = comm, comm.rank, []

    def all_reduce(self, x, peers):
        self.said.append(("all_reduce", peers, x.size))
        return self.comm.all_reduce(x, peers)

    def all_gather(self, x, peers, sizes, axis):
        self.said.append(("all_gather", peers, x.size))
        return self.comm.all_gather(x, peers, sizes, axis)

    def reduce_scatter(self, x, peers, sizes):
        self.said.append(("reduce_scatter", peers, x.size))
        return self.comm.reduce_scatter(x, peers, sizes)

    def send(self, x, to):
        self.said.append(("send", (self.rank, to), x.size))
        self.comm.send(x, to)

    def receive(self, source, like):
        return self.comm.receive(source, like)


def overheard(count: int, work: Callable) -> list:
    """work(comm) of every rank, at the same time."""
    return on_each(count, lambda comm: work(Overheard(comm)))

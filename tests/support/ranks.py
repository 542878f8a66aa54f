"""Run ranks as threads of one process, and record their messages."""

from __future__ import annotations

from collections.abc import Callable

from refengine.ranks.comm.threads import Threads, on_each


class Overheard:
    """Forward a Comm's calls, and list them in `said` as (operation, peers, number of elements)."""

    def __init__(self, comm: Threads):
        self.comm, self.rank, self.said = comm, comm.rank, []

    def all_reduce(self, x, peers):
        """Return the sum over the peers."""
        self.said.append(("all_reduce", peers, x.size))
        return self.comm.all_reduce(x, peers)

    def all_gather(self, x, peers, sizes, axis):
        """Return the concatenated arrays of the peers."""
        self.said.append(("all_gather", peers, x.size))
        return self.comm.all_gather(x, peers, sizes, axis)

    def reduce_scatter(self, x, peers, sizes):
        """Return this rank's rows of the sum."""
        self.said.append(("reduce_scatter", peers, x.size))
        return self.comm.reduce_scatter(x, peers, sizes)

    def send(self, x, to):
        """Send an array to a rank."""
        self.said.append(("send", (self.rank, to), x.size))
        self.comm.send(x, to)

    def receive(self, source, like):
        """Return the array that a rank sent."""
        return self.comm.receive(source, like)


def overheard(count: int, work: Callable) -> list:
    """Return work(comm) of each rank, run at the same time, with an Overheard comm."""
    return on_each(count, lambda comm: work(Overheard(comm)))

"""Train one model in several processes, each on its own rows, with gradients exchanged in shared memory.

Each process has one thread, so results do not depend on scheduling: the same processor gives the same bits.
Every rank computes the sums itself, in the order of ranks.
"""

import os
import threading
import time

import torch
import torch.multiprocessing as mp

TIMEOUT = 900.0  # seconds that a rank waits for the others


class Ranks:
    """A single process: rank 0 of 1. `Shared` is the class for several processes."""

    rank, size = 0, 1

    def allocate(self, count):
        """Allocate the updates of `count` parameters."""
        self.updates = torch.zeros(count)

    def mean(self, array):
        """Replace an array by its mean over the ranks."""

    def wait(self):
        """Wait until all ranks are here (a barrier)."""


class Shared(Ranks):
    """One of several processes; `memory` (size + 1, count) is shared, `barrier` a multiprocessing barrier."""

    def __init__(self, rank, size, memory, barrier):
        self.rank, self.size, self.memory, self.barrier = rank, size, memory, barrier

    def allocate(self, count):
        """Use the last row of the shared memory for the updates."""
        self.rows = self.memory[:, :count]
        self.updates = self.rows[self.size]

    def mean(self, array):
        """Replace an array by its mean over the ranks, summed in the order of ranks."""
        rows = self.rows[: self.size, : len(array)]
        rows[self.rank].copy_(array)
        self.wait()
        array.copy_(rows[0])
        for row in rows[1:]:
            array.add_(row)
        array.div_(self.size)
        self.wait()

    def wait(self):
        """Wait until all ranks are here; raise BrokenBarrierError after TIMEOUT, or if a rank has ended."""
        self.barrier.wait(TIMEOUT)


def _child(rank, size, memory, barrier, parent, work, args):
    """Run one rank; end when the parent ends, even if it was killed."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        work(Shared(rank, size, memory, barrier), *args)
    except threading.BrokenBarrierError:
        os._exit(1)
    except BaseException:
        barrier.abort()
        raise


def run(size, count, work, *args):
    """Call work(ranks, *args) in `size` processes with room for `count` parameters; this one is rank 0."""
    if size == 1:
        return work(Ranks(), *args)
    context = mp.get_context("spawn")
    memory, barrier = torch.zeros(size + 1, count).share_memory_(), context.Barrier(size)
    others = [
        context.Process(target=_child, args=(r, size, memory, barrier, os.getpid(), work, args), daemon=True)
        for r in range(1, size)
    ]
    for process in others:
        process.start()
    try:
        return work(Shared(0, size, memory, barrier), *args)
    except BaseException:
        barrier.abort()
        raise
    finally:
        for process in others:
            process.join(30)
            process.kill()

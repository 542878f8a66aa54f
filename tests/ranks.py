"""Ranks as threads of one process: a sum or a gathering is a barrier, everyone's value, and a barrier."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from queue import Empty, Queue

import numpy as np

PATIENCE = 20.0  # seconds until a rank that waits for another gives up


class Meeting:
    def __init__(self, count: int):
        self.barrier, self.brought = threading.Barrier(count), {}


class Threads:
    """The Comm of one rank. `said` lists what it took part in: (verb, peers, values of an array)."""

    def __init__(self, rank: int, meetings: dict, queues: dict):
        self.rank, self.meetings, self.queues, self.said = rank, meetings, queues, []

    def sum(self, x, peers):
        return reduce(add, self.exchange("sum", x, peers))  # in order of rank: the same bits for everyone

    def gather(self, x, peers):
        return np.concatenate(self.exchange("gather", x, peers), axis=-1)

    def send(self, x, to):
        self.said.append(("send", (self.rank, to), x.size))
        self.queues[self.rank, to].put(x)

    def receive(self, source):
        return self.queues[source, self.rank].get(timeout=PATIENCE)

    def exchange(self, verb, x, peers):
        self.said.append((verb, peers, x.size))
        meeting = self.meetings[verb, peers]
        meeting.brought[self.rank] = x
        meeting.barrier.wait(PATIENCE)
        values = [meeting.brought[peer] for peer in peers]
        meeting.barrier.wait(PATIENCE)
        return values


class Meetings(defaultdict):
    """One for each set of peers; threads may ask for the same one at once."""

    lock = threading.Lock()

    def __missing__(self, key):
        with self.lock:
            if key not in self:
                self[key] = Meeting(len(key[1]))
            return self[key]


def on_each(count: int, work: Callable) -> list:
    """work(comm) of every rank, at the same time; the first error that is not another rank's absence."""
    meetings, queues = Meetings(), {(a, b): Queue() for a in range(count) for b in range(count)}

    def one(rank: int):
        try:
            return work(Threads(rank, meetings, queues))
        except BaseException:
            for meeting in list(meetings.values()):
                meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(one, rank) for rank in range(count)]
    errors = [job.exception() for job in jobs if job.exception()]
    own = [e for e in errors if not isinstance(e, threading.BrokenBarrierError | Empty)]
    if errors:
        raise (own or errors)[0]
    return [job.result() for job in jobs]

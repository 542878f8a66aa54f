"""Ranks over MPI: mpi4py, under mpiexec. Every wait is a poll that yields, against a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from time import monotonic

import numpy as np

from refengine.ranks.comm import AHEAD, TIMEOUT, Ranks, memory
from refengine.ranks.comm.guard import GRACE, Guard
from refengine.ranks.launcher import launched
from refengine.spec.config import InputError, first_line

WORD, ALARM, BEAT = 1, 2, 3  # tags
EAGER = 0.002  # seconds of yielding before a waiting rank begins to sleep
LISTEN = 0.02  # seconds between two checks for alarms and heartbeats


class MPI(Ranks):
    """Connect one rank of MPI.COMM_WORLD; InputError if mpi4py is missing."""

    name = "mpi"

    def __init__(self, timeout: float = TIMEOUT):
        self.guard = Guard(launched().rank, timeout)
        try:
            with self.guard.limit("came"):
                from mpi4py import MPI as library
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"ranks under mpiexec need mpi4py: pip install 'refengine[mpi]' ({error})"
            ) from None
        self.mpi, self.world = library, library.COMM_WORLD
        super().__init__(self.world.rank, self.world.size, timeout)
        self.posted: list = []  # (peer, request, array) under way
        self.given: list[int] = [0] * self.count  # heartbeats sent to each rank
        self.heard: list[int] = [0] * self.count  # and received from each
        self.calls: list = []  # heartbeats under way
        self.ending = False

    def exchange(self, out, into, idle=False):
        """Start all receives, then all sends, and wait for them."""
        requests = [(peer, self._start(self.world.Irecv, x, peer)) for peer, x in into.items()]
        requests += [(peer, self._start(self.world.Isend, x, peer)) for peer, x in out.items()]
        self._wait(requests, idle)

    def post(self, x, to):
        """Start a send; waits for the oldest if AHEAD of them are under way."""
        self.posted = [entry for entry in self.posted if not self._done(*entry[:2])]
        if len(self.posted) >= AHEAD:
            self._wait([self.posted.pop(0)[:2]], idle=False)
        self.posted.append((to, self._start(self.world.Isend, x, to), x))

    def _start(self, verb: Callable, x, peer: int):
        if not (hasattr(x, "ctypes") or x.device.type == "cpu"):
            raise InputError("MPI ranks send from the processor's memory: start ranks on GPUs with torchrun")
        try:
            return verb([memory(x), self.mpi.BYTE], peer, WORD)
        except self.mpi.Exception:
            raise self.connection_lost(peer) from None

    def _wait(self, requests: list, idle: bool) -> None:
        began = listened = monotonic()
        while requests := [(peer, request) for peer, request in requests if not self._done(peer, request)]:
            now = monotonic()
            if now - listened > LISTEN:
                listened = now
                self._listen()
                waiting = {peer for peer, _ in requests}
                if not idle:
                    self._sign(waiting)
                    if dead := self.heartbeat.dead(waiting, began):
                        raise self.timed_out(dead)
            if now - began < EAGER:
                os.sched_yield()
            else:
                time.sleep(0.01 if idle and now - began > 1 else 0.0001)
        self.heartbeat.exchanges += 1

    def _done(self, peer: int, request) -> bool:
        try:
            return request.Test()
        except self.mpi.Exception:
            raise self.connection_lost(peer) from None

    def _listen(self) -> None:
        """Receive the alarms and heartbeats that have arrived; an alarm raises."""
        status = self.mpi.Status()
        for tag in (ALARM, BEAT):
            while self.world.Iprobe(self.mpi.ANY_SOURCE, tag, status):
                text = bytearray(status.Get_count(self.mpi.BYTE))
                self.world.Recv([text, self.mpi.BYTE], status.source, tag)
                if tag == ALARM:
                    raise self.stopped(status.source, text.decode())
                self.heard[status.source] += 1
                self.heartbeat.receive(status.source, text.decode())

    def _sign(self, waits: Iterable[int] = ()) -> bool:
        """Send a heartbeat if one is due, and return whether."""
        if self.ending or not (text := self.heartbeat.beat(waits)):
            return False
        self.calls = [(peer, call) for peer, call in self.calls if not self._done(peer, call)]
        busy = {peer for peer, _ in self.calls}  # have not received the previous one
        for peer, call in self._call(text, BEAT, busy):
            self.calls.append((peer, call))
            self.given[peer] += 1
        return True

    def at_work(self):
        """Send a heartbeat if one is due, and check for alarms then."""
        if self._sign():
            self._listen()

    def alarm(self, why):
        """Send every rank the reason why this one stops, and give them time to print it."""
        calls = self._call(why, ALARM)
        until = monotonic() + GRACE  # the other ranks print their reason before mpiexec ends them
        while monotonic() < until:
            for _, call in calls:
                with suppress(self.mpi.Exception):
                    call.Test()
            time.sleep(0.01)

    def _call(self, text: str, tag: int, without: Collection[int] = ()) -> list:
        data, calls = text.encode()[:2000], []
        for rank in range(self.count):
            if rank != self.rank and rank not in without:
                with suppress(self.mpi.Exception):  # a lost rank is reported by the ranks that wait for it
                    calls.append((rank, self.world.Isend([data, self.mpi.BYTE], rank, tag)))
        return calls

    def finish(self):
        """Complete every message under way, heartbeats too: MPI_Finalize fails if one was not received.

        Each rank sends every other the number of heartbeats it sent, and waits for as many.
        """
        self.verb = "end"
        self._wait([entry[:2] for entry in self.posted], idle=False)
        self.ending = True
        theirs = {rank: np.empty(1, np.int64) for rank in range(self.count) if rank != self.rank}
        self.exchange({rank: np.array([self.given[rank]]) for rank in theirs}, theirs)
        began = monotonic()
        while late := [rank for rank, given in theirs.items() if self.heard[rank] < given[0]]:
            self._listen()
            if monotonic() - began > self.timeout:
                raise self.timed_out(late)
            os.sched_yield()
        self._wait(self.calls, idle=False)

    def leave(self, code):
        """Finalize MPI; with a code other than 0, exit the process at once."""
        if code:
            os._exit(code)
        if not self.ending:
            self.finish()
        try:
            with self.guard.limit("came to the end"):
                self.mpi.Finalize()
        except self.mpi.Exception as error:
            os.write(2, f"refengine, rank {self.rank}: MPI does not end ({first_line(error)})\n".encode())
            os._exit(1)

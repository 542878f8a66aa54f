"""Ranks over MPI: mpi4py, under mpiexec. Every wait is a poll that yields, against a deadline."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

import numpy as np

from refengine.ranks.comm import AHEAD, TIMEOUT, Ranks, first_line, memory
from refengine.ranks.launcher import launched
from refengine.spec.config import InputError

WORD, ALARM, BEAT = 1, 2, 3  # tags
EAGER = 0.002  # seconds of yielding before a rank that waits begins to sleep
LISTEN = 0.02  # seconds between two looks for what other ranks say of themselves
GRACE = 1.0  # seconds that others have to say why they end, before mpiexec ends them all


class MPI(Ranks):
    """This process, as one rank of MPI.COMM_WORLD."""

    name = "mpi"

    def __init__(self, timeout: float = TIMEOUT):
        try:
            with watched(timeout, "came"):
                from mpi4py import MPI as library
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"ranks under mpiexec need mpi4py: pip install 'refengine[mpi]' ({error})"
            ) from None
        self.mpi, self.world = library, library.COMM_WORLD
        super().__init__(self.world.rank, self.world.size, timeout)
        self.posted: list = []  # (peer, request, array) under way
        self.given: list[int] = [0] * self.count  # signs of life, to each rank
        self.heard: list[int] = [0] * self.count  # and from each
        self.calls: list = []  # signs under way
        self.ending = False

    def exchange(self, out, into, idle=False):
        requests = [(peer, self._start(self.world.Irecv, x, peer)) for peer, x in into.items()]
        requests += [(peer, self._start(self.world.Isend, x, peer)) for peer, x in out.items()]
        self._wait(requests, idle)

    def post(self, x, to):
        self.posted = [entry for entry in self.posted if not self._done(*entry[:2])]
        if len(self.posted) >= AHEAD:
            self._wait([self.posted.pop(0)[:2]], idle=False)
        self.posted.append((to, self._start(self.world.Isend, x, to), x))

    def _start(self, verb: Callable, x, peer: int):
        if not (hasattr(x, "ctypes") or x.device.type == "cpu"):
            raise InputError("MPI ranks speak from the processor's memory: start ranks on GPUs with torchrun")
        try:
            return verb([memory(x), self.mpi.BYTE], peer, WORD)
        except self.mpi.Exception:
            raise self.lost(peer) from None

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
                        raise self.silent(dead)
            if now - began < EAGER:
                os.sched_yield()
            else:
                time.sleep(0.01 if idle and now - began > 1 else 0.0001)
        self.heartbeat.exchanges += 1

    def _done(self, peer: int, request) -> bool:
        try:
            return request.Test()
        except self.mpi.Exception:
            raise self.lost(peer) from None

    def _listen(self) -> None:
        """Hear who stops, and signs of life."""
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
        """Give a sign of life, if it is time."""
        if self.ending or not (text := self.heartbeat.beat(waits)):
            return False
        self.calls = [(peer, call) for peer, call in self.calls if not self._done(peer, call)]
        busy = {peer for peer, _ in self.calls}  # has not even taken the last one
        for peer, call in self._call(text, BEAT, busy):
            self.calls.append((peer, call))
            self.given[peer] += 1
        return True

    def at_work(self):
        if self._sign():
            self._listen()

    def alarm(self, why):
        calls = self._call(why, ALARM)
        until = monotonic() + GRACE  # so that others can speak before mpiexec ends them
        while monotonic() < until:
            for _, call in calls:
                with suppress(self.mpi.Exception):
                    call.Test()
            time.sleep(0.01)

    def _call(self, text: str, tag: int, without: Collection[int] = ()) -> list:
        data, calls = text.encode()[:2000], []
        for rank in range(self.count):
            if rank != self.rank and rank not in without:
                with suppress(self.mpi.Exception):  # it is lost, which whoever waits for it says
                    calls.append((rank, self.world.Isend([data, self.mpi.BYTE], rank, tag)))
        return calls

    def finish(self):
        """Each says how many signs it gave, and waits for as many: Finalize fails where one was not heard."""
        self.verb = "end"
        self._wait([entry[:2] for entry in self.posted], idle=False)
        self.ending = True
        theirs = {rank: np.empty(1, np.int64) for rank in range(self.count) if rank != self.rank}
        self.exchange({rank: np.array([self.given[rank]]) for rank in theirs}, theirs)
        began = monotonic()
        while late := [rank for rank, given in theirs.items() if self.heard[rank] < given[0]]:
            self._listen()
            if monotonic() - began > self.timeout:
                raise self.silent(late)
            os.sched_yield()
        self._wait(self.calls, idle=False)

    def leave(self, code):
        if code:
            os._exit(code)
        if not self.ending:
            self.finish()
        try:
            with watched(self.timeout, "came to the end"):
                self.mpi.Finalize()
        except self.mpi.Exception as error:
            os.write(2, f"refengine, rank {self.rank}: MPI does not end ({first_line(error)})\n".encode())
            os._exit(1)


@contextmanager
def watched(timeout: float, did: str) -> Iterator[None]:
    """Meet the others within `timeout`, or end, saying what they did not.

    MPI_Init and MPI_Finalize wait for ever, and inside them Python cannot act: a child process waits for the
    end of the block, on a pipe.
    """
    rank, parent = launched().rank, os.getpid()
    ending, held = os.pipe()
    child = os.fork()
    if not child:
        os.close(held)
        if not select.select([ending], [], [], timeout)[0]:
            text = f"refengine, rank {rank}: not all ranks {did} within {timeout:g} s\n"
            os.write(2, text.encode())
            time.sleep(GRACE)
            if os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
        os._exit(0)
    os.close(ending)
    try:
        yield
    finally:
        os.close(held)
        os.waitpid(child, 0)

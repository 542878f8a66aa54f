"""Ranks over MPI: mpi4py, under mpiexec. Every wait is a poll that yields, against a deadline."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from refengine.comm import AHEAD, PATIENCE, Ranks, memory
from refengine.place import place
from spec.config import InputError

WORD, ALARM = 1, 2  # tags
EAGER = 0.002  # seconds of yielding before a rank that waits begins to sleep
LISTEN = 0.02  # seconds between two looks for an alarm
GRACE = 1.0  # seconds that others have to say why they end, before mpiexec ends them all


class MPI(Ranks):
    """This process, as one rank of MPI.COMM_WORLD."""

    name = "mpi"

    def __init__(self, patience: float = PATIENCE):
        try:
            with watched(patience):
                from mpi4py import MPI as library
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"ranks under mpiexec need mpi4py: pip install 'refengine[mpi]' ({error})"
            ) from None
        self.mpi, self.world = library, library.COMM_WORLD
        super().__init__(self.world.rank, self.world.size, patience)
        self.posted: list = []  # (peer, request, array) under way

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
        while True:
            requests = [(peer, request) for peer, request in requests if not self._done(peer, request)]
            if not requests:
                return
            now = monotonic()
            if now - listened > LISTEN:
                listened = now
                self._listen()
                if not idle and now - began > self.patience:
                    raise self.silent({peer for peer, _ in requests})
            if now - began < EAGER:
                os.sched_yield()
            else:
                time.sleep(0.01 if idle and now - began > 1 else 0.0001)

    def _done(self, peer: int, request) -> bool:
        try:
            return request.Test()
        except self.mpi.Exception:
            raise self.lost(peer) from None

    def _listen(self) -> None:
        status = self.mpi.Status()
        if self.world.Iprobe(self.mpi.ANY_SOURCE, ALARM, status):
            text = bytearray(status.Get_count(self.mpi.BYTE))
            self.world.Recv([text, self.mpi.BYTE], status.source, ALARM)
            raise self.stopped(status.source, text.decode())

    def alarm(self, why):
        text = why.encode()[:2000]
        calls = [self.world.Isend([text, self.mpi.BYTE], rank, ALARM)
                 for rank in range(self.count) if rank != self.rank]  # fmt: skip
        until = monotonic() + GRACE
        while monotonic() < until:  # so that it leaves, and others can speak, before mpiexec ends them
            for call in calls:
                call.Test()
            time.sleep(0.01)

    def leave(self, code):
        if code:
            os._exit(code)
        self._wait([entry[:2] for entry in self.posted], idle=False)
        self.mpi.Finalize()


@contextmanager
def watched(patience: float) -> Iterator[None]:
    """Meet the others within `patience`, or end: MPI_Init waits for ever, and inside it Python cannot act.

    A child process waits for the end of the block, on a pipe.
    """
    rank = place().rank
    ending, held = os.pipe()
    child = os.fork()
    if not child:
        os.close(held)
        if not select.select([ending], [], [], patience)[0]:
            text = f"refengine, rank {rank}: not all ranks came within {patience:g} s\n"
            os.write(2, text.encode())
            os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    os.close(ending)
    try:
        yield
    finally:
        os.close(held)
        os.waitpid(child, 0)

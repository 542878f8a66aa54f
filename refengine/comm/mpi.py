"""Ranks over MPI: mpi4py, under mpiexec. Every wait is a poll that yields, against a deadline."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

from refengine.comm import AHEAD, PATIENCE, RankError, Ranks, culprits, memory
from refengine.place import place
from spec.config import InputError

WORD, ALARM, WAITS, AT_WORK = 1, 2, 3, 4  # tags
EAGER = 0.002  # seconds of yielding before a rank that waits begins to sleep
LISTEN = 0.02  # seconds between two looks for an alarm
GRACE = 1.0  # seconds that others have to say why they end, before mpiexec ends them all


class MPI(Ranks):
    """This process, as one rank of MPI.COMM_WORLD."""

    name = "mpi"

    def __init__(self, patience: float = PATIENCE):
        try:
            with watched(patience, "came"):
                from mpi4py import MPI as library
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"ranks under mpiexec need mpi4py: pip install 'refengine[mpi]' ({error})"
            ) from None
        self.mpi, self.world = library, library.COMM_WORLD
        super().__init__(self.world.rank, self.world.size, patience)
        self.posted: list = []  # (peer, request, array) under way
        self.waits: dict[int, list[int]] = {}  # ranks that have waited in vain, and for whom
        self.heard: dict[int, float] = {}  # when ranks were last known to be at work
        self.told = monotonic()

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
                latest = now - self.patience
                silent = {peer for peer, _ in requests if max(began, self.heard.get(peer, began)) < latest}
                if silent and not idle:
                    raise self._silent(silent)
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
        """Hear who stops, who waits in vain, and who is at work."""
        status = self.mpi.Status()
        for tag in (ALARM, WAITS, AT_WORK):
            while self.world.Iprobe(self.mpi.ANY_SOURCE, tag, status):
                text = bytearray(status.Get_count(self.mpi.BYTE))
                self.world.Recv([text, self.mpi.BYTE], status.source, tag)
                if tag == ALARM:
                    raise self.stopped(status.source, text.decode())
                if tag == WAITS:
                    self.waits[status.source] = [int(peer) for peer in text.split()]
                else:
                    self.heard[status.source] = monotonic()

    def _silent(self, peers: set[int]) -> RankError:
        """Who of all ranks does not answer: not one that waits in vain itself."""
        self._shout(" ".join(map(str, peers)), WAITS, self._listen)
        return self.silent(culprits(peers, self.waits))

    def at_work(self):
        if monotonic() - self.told > self.patience / 4:
            self.told = monotonic()
            self._listen()
            for call in self._calls("", AT_WORK):
                call.Free()

    def ready(self):
        super().ready()
        self._listen()  # what was said before has arrived: a word that nobody heard would make Finalize fail

    def alarm(self, why):
        self._shout(why, ALARM)  # and stay, so that others can speak before mpiexec ends them

    def _shout(self, text: str, tag: int, meanwhile: Callable = lambda: None) -> None:
        """To all who can hear it within GRACE."""
        calls = self._calls(text, tag)
        until = monotonic() + GRACE
        while monotonic() < until:
            for call in calls:
                call.Test()
            meanwhile()
            time.sleep(0.01)

    def _calls(self, text: str, tag: int) -> list:
        data = text.encode()[:2000]
        others = (rank for rank in range(self.count) if rank != self.rank)
        return [self.world.Isend([data, self.mpi.BYTE], rank, tag) for rank in others]

    def leave(self, code):
        if code:
            os._exit(code)
        self._wait([entry[:2] for entry in self.posted], idle=False)
        with watched(self.patience, "came to the end"), suppress(self.mpi.Exception):
            self.mpi.Finalize()  # which fails where an alarm was not heard: who raised it ends the job


@contextmanager
def watched(patience: float, did: str) -> Iterator[None]:
    """Meet the others within `patience`, or end, saying what they did not.

    MPI_Init and MPI_Finalize wait for ever, and inside them Python cannot act: a child process waits for the
    end of the block, on a pipe.
    """
    rank, parent = place().rank, os.getpid()
    ending, held = os.pipe()
    child = os.fork()
    if not child:
        os.close(held)
        if not select.select([ending], [], [], patience)[0]:
            text = f"refengine, rank {rank}: not all ranks {did} within {patience:g} s\n"
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

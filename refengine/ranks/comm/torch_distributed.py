"""Ranks over torch.distributed, under torchrun: gloo between processors, NCCL between GPUs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

import numpy as np

from refengine.ranks.comm import AHEAD, TIMEOUT, Ranks, total
from refengine.spec.config import InputError, first_line

ALARM, BEAT = "refengine/alarm", "refengine/heartbeat/{}"  # keys of the store
LOOK = 0.25  # seconds between two checks for alarms and heartbeats
GRACE = 1.0  # seconds that the other ranks have to print their reason, before torchrun ends them all
FOREVER = timedelta(days=365)
WAITING = object()


class TorchDistributed(Ranks):
    """Connect one rank of the default process group; InputError if the ranks do not meet.

    device: "cpu" or that of this rank. deterministic: all_reduce between GPUs adds in order of rank.
    """

    name = "torch"

    def __init__(self, timeout: float = TIMEOUT, device: str = "cpu", deterministic: bool = False):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # one sentence, no C++ trace
        try:
            import torch
            import torch.distributed as library
        except ModuleNotFoundError:
            raise InputError("ranks under torchrun need PyTorch: pip install 'refengine[torch]'") from None
        self.torch, self.library, self.deterministic = torch, library, deterministic
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        super().__init__(rank, count, timeout)
        try:
            gpu = device != "cpu" and torch.cuda.is_available()
            library.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout)
            )
            self.store = library.distributed_c10d._get_default_store()
        except Exception as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise InputError(
                f"the {count} ranks did not all connect to {where} within {timeout:g} s ({first_line(error)})"
            ) from None
        self.groups: dict[tuple[int, ...], object] = {}
        self.posted: list = []  # (peer, work, array) under way
        self.works: SimpleQueue = SimpleQueue()
        self.ended: SimpleQueue = SimpleQueue()
        self.waited_for = rank
        Thread(target=self._wait, daemon=True).start()

    def exchange(self, out, into, idle=False):
        """Start all receives, then all sends, and wait for them."""
        works = []
        for start, arrays in ((self.library.irecv, into), (self.library.isend, out)):
            works += [(peer, self._start(start, x, peer), x) for peer, x in arrays.items()]
        self._finish(works, idle)

    def post(self, x, to):
        """Start a send; waits for the oldest if AHEAD of them are under way."""
        if len(self.posted) >= AHEAD:
            self._finish([self.posted.pop(0)])
        self.posted.append((to, self._start(self.library.isend, x, to), x))

    def _finish(self, works: list, idle: bool = False) -> None:
        """Wait for works (peer, work, array); those of NCCL here, where waiting only orders the queue."""
        began = monotonic()
        if any(on_gpu(x) for _, _, x in works):
            failed = self._failure(works, timedelta(seconds=self.timeout))
        else:
            self.works.put(works)
            while (failed := self._answer()) is WAITING:
                if not idle:
                    self._attend(self.waited_for, began)
        if failed:
            raise self._gone(*failed)
        self.heartbeat.exchanges += 1

    def _wait(self) -> None:
        """Wait for works in a thread of its own: a wait of gloo that times out would close the connection."""
        while True:
            self.ended.put(self._failure(self.works.get(), FOREVER))

    def _failure(self, works: list, limit: timedelta) -> tuple[int, Exception] | None:
        """Return the first peer whose work failed and its error, or None."""
        for peer, work, _ in works:
            self.waited_for = peer
            try:
                work.wait(limit)
            except RuntimeError as error:
                return peer, error
        return None

    def _answer(self):
        try:
            return self.ended.get(timeout=LOOK)
        except Empty:
            return WAITING

    def all_reduce(self, x, peers):
        """Return the sum over the peers; arrays on a GPU are added by NCCL, or in order of rank."""
        if len(peers) == 1 or not on_gpu(x):
            return super().all_reduce(x, peers)
        self.sent["all_reduce"] += x.nbytes * 2 * (len(peers) - 1) // len(peers)
        group = self._group(peers)
        if self.deterministic:
            terms = [self.torch.empty_like(x) for _ in peers]
            self.library.all_gather(terms, x.contiguous(), group=group)
            return total(terms)
        x = x.contiguous().clone()
        self.library.all_reduce(x, group=group)
        return x

    def _group(self, peers: tuple[int, ...]):
        """Return the communicator of a set of ranks, which NCCL needs; only its members create it."""
        if peers not in self.groups:
            self.groups[peers] = self.library.new_group(list(peers), use_local_synchronization=True)
        return self.groups[peers]

    def _start(self, verb, x, peer: int):
        try:
            return verb(self._tensor(x), peer)
        except RuntimeError as error:
            raise self._gone(peer, error) from None

    def _tensor(self, x):
        x = self.torch.from_numpy(x.view(np.uint8)) if isinstance(x, np.ndarray) else x
        return x.reshape(-1).view(self.torch.uint8)

    def _gone(self, peer: int, error: Exception) -> Exception:
        """Return the error for a failed peer: the reason reported by a rank, or how its connection ended."""
        self.missed = peer
        if alarm := self._ask(self._hear, 2 * GRACE):
            return alarm
        return self.timed_out([peer]) if "imed out" in str(error) else self.connection_lost(peer)

    def _hear(self, seconds: float) -> Exception | None:
        """Return the error of an alarm that arrives within some seconds, or None."""
        until = monotonic() + seconds
        while not self.store.check([ALARM]):
            if monotonic() > until:
                return None
            time.sleep(0.02)
        rank, _, why = self.store.get(ALARM).decode().partition(" ")
        return self.stopped(int(rank), why)

    def _attend(self, peer: int, since: float) -> None:
        """Exchange heartbeats while waiting for a peer; raises for an alarm or a dead rank."""
        if alarm := self._ask(self._news, [peer]):
            raise alarm
        if dead := self.heartbeat.dead([peer], since):
            self.missed = dead[0]
            raise self.timed_out(dead)

    def _news(self, waits: Collection[int] = ()) -> Exception | None:
        """Send a heartbeat if one is due, read those of the others; return the error of an alarm, if any."""
        if text := self.heartbeat.beat(waits):
            self.store.set(BEAT.format(self.rank), text)
        for rank in range(self.count):
            if rank != self.rank and self.store.check([BEAT.format(rank)]):
                self.heartbeat.receive(rank, self.store.get(BEAT.format(rank)).decode())
        return self._hear(0)

    def at_work(self):
        """Send a heartbeat if one is due, and check for alarms then."""
        if self.heartbeat.due and (alarm := self._ask(self._news)):
            raise alarm

    def alarm(self, why):
        """Store the reason why this rank stops, and give the others time to print it."""
        self._ask(self.store.compare_set, ALARM, "", f"{self.rank} {why}")
        time.sleep(GRACE)  # the other ranks print their reason before torchrun ends them

    def _ask(self, verb: Callable, *args: Any) -> Any:
        """Return the answer of the store, or None if there is none in time: its host may be lost."""
        answer: list = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                answer.append(verb(*args))

        asking = Thread(target=ask, daemon=True)
        asking.start()
        asking.join(3 * GRACE)
        return answer[0] if answer else None

    def finish(self):
        """Wait for every send under way."""
        self.verb = "end"
        self._finish(self.posted)

    def leave(self, code):
        """Close the process group; with a code other than 0, exit the process at once."""
        if code:
            os._exit(code)
        self.library.destroy_process_group()


def on_gpu(x) -> bool:
    """Return whether an array is in the memory of a GPU."""
    return not isinstance(x, np.ndarray) and x.device.type != "cpu"

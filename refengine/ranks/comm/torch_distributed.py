"""Ranks over torch.distributed, under torchrun: gloo between processors, NCCL between GPUs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from datetime import timedelta
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic

import numpy as np

from refengine.ranks.comm import AHEAD, TIMEOUT, Ranks, first_line, total
from refengine.spec.config import InputError

ALARM, BEAT = "refengine/alarm", "refengine/heartbeat/{}"  # keys of the store
LOOK = 0.25  # seconds between two looks for what other ranks say of themselves
GRACE = 1.0  # seconds that others have to say why they end, before torchrun ends them all
FOREVER = timedelta(days=365)
WAITING = object()


class TorchDistributed(Ranks):
    """This process, as one rank of the default process group."""

    name = "torch"

    def __init__(self, timeout: float = TIMEOUT, device: str = "cpu", deterministic: bool = False):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer gets our sentence, not a trace
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
                f"the {count} ranks did not meet at {where} within {timeout:g} s ({first_line(error)})"
            ) from None
        self.groups: dict[tuple[int, ...], object] = {}
        self.posted: list = []  # (peer, work, array) under way
        self.works, self.ended = SimpleQueue(), SimpleQueue()
        self.waited_for = rank
        Thread(target=self._wait, daemon=True).start()

    def exchange(self, out, into, idle=False):
        works = []
        for start, arrays in ((self.library.irecv, into), (self.library.isend, out)):
            works += [(peer, self._start(start, x, peer), x) for peer, x in arrays.items()]
        self._finish(works, idle)

    def post(self, x, to):
        if len(self.posted) >= AHEAD:
            self._finish([self.posted.pop(0)])
        self.posted.append((to, self._start(self.library.isend, x, to), x))

    def _finish(self, works: list, idle: bool = False) -> None:
        """Wait for works (peer, work, array): of NCCL on this thread, which only queues what is to follow."""
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
        """In a thread of its own: a wait of gloo that ends by a limit ends the connection, too."""
        while True:
            self.ended.put(self._failure(self.works.get(), FOREVER))

    def _failure(self, works: list, limit: timedelta) -> tuple[int, Exception] | None:
        """The first peer for which one cannot wait, and why."""
        for self.waited_for, work, _ in works:
            try:
                work.wait(limit)
            except RuntimeError as error:
                return self.waited_for, error
        return None

    def _answer(self):
        try:
            return self.ended.get(timeout=LOOK)
        except Empty:
            return WAITING

    def all_reduce(self, x, peers):
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
        """NCCL wants a communicator for each set of ranks; only its members have to ask for it."""
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
        """Why a peer is not there: what a rank said that stopped, or how the connection ended."""
        self.missed = peer
        silent = "imed out" in str(error)
        return self._ask(self._hear, 2 * GRACE) or (self.silent([peer]) if silent else self.lost(peer))

    def _hear(self, seconds: float) -> Exception | None:
        """An alarm that is there, or comes in time."""
        until = monotonic() + seconds
        while not self.store.check([ALARM]):
            if monotonic() > until:
                return None
            time.sleep(0.02)
        rank, _, why = self.store.get(ALARM).decode().partition(" ")
        return self.stopped(int(rank), why)

    def _attend(self, peer: int, since: float) -> None:
        """Waiting for a peer: hear who stops, and signs of life; give one."""
        if alarm := self._ask(self._news, [peer]):
            raise alarm
        if dead := self.heartbeat.dead([peer], since):
            self.missed = dead[0]
            raise self.silent(dead)

    def _news(self, waits: Collection[int] = ()) -> Exception | None:
        if text := self.heartbeat.beat(waits):
            self.store.set(BEAT.format(self.rank), text)
        for rank in range(self.count):
            if rank != self.rank and self.store.check([BEAT.format(rank)]):
                self.heartbeat.receive(rank, self.store.get(BEAT.format(rank)).decode())
        return self._hear(0)

    def at_work(self):
        if self.heartbeat.due and (alarm := self._ask(self._news)):
            raise alarm

    def alarm(self, why):
        self._ask(self.store.compare_set, ALARM, "", f"{self.rank} {why}")
        time.sleep(GRACE)  # so that others can speak before torchrun ends them

    def _ask(self, verb, *args):
        """The answer of the store, or None: one on a machine that is lost would be waited for."""
        answer: list = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                answer.append(verb(*args))

        asking = Thread(target=ask, daemon=True)
        asking.start()
        asking.join(3 * GRACE)
        return answer[0] if answer else None

    def finish(self):
        self.verb = "end"
        self._finish(self.posted)

    def leave(self, code):
        if code:
            os._exit(code)
        self.library.destroy_process_group()


def on_gpu(x) -> bool:
    return not isinstance(x, np.ndarray) and x.device.type != "cpu"

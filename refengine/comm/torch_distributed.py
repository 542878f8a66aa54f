"""Ranks over torch.distributed, under torchrun: gloo between processors, NCCL between GPUs."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from threading import Thread

import numpy as np

from refengine.comm import AHEAD, PATIENCE, Ranks, culprits, total
from spec.config import InputError

ALARM, WAITS, AT_WORK, READY = (f"refengine/{key}" for key in ("alarm", "waits/{}", "work/{}", "ready/{}"))
GRACE = 1.0  # seconds that others have to say why they end, before torchrun ends them all
FOREVER = timedelta(days=365)


class TorchDistributed(Ranks):
    """This process, as one rank of the default process group."""

    name = "torch"

    def __init__(self, patience: float = PATIENCE, device: str = "cpu", deterministic: bool = False):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer gets our sentence, not a trace
        try:
            import torch
            import torch.distributed as library
        except ModuleNotFoundError:
            raise InputError("ranks under torchrun need PyTorch: pip install 'refengine[torch]'") from None
        self.torch, self.library, self.deterministic = torch, library, deterministic
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        super().__init__(rank, count, patience)
        try:
            gpu = device != "cpu" and torch.cuda.is_available()
            library.init_process_group(
                "cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=patience)
            )
            self.store = library.distributed_c10d._get_default_store()
        except Exception as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise InputError(
                f"the {count} ranks did not meet at {where} within {patience:g} s ({first_line(error)})"
            ) from None
        self.groups: dict[tuple[int, ...], object] = {}
        self.posted: list = []  # (peer, work, array) under way
        self.told = time.monotonic()

    def exchange(self, out, into, idle=False):
        works = []
        for start, arrays in ((self.library.irecv, into), (self.library.isend, out)):
            for peer, x in arrays.items():
                works.append((peer, self._start(start, x, peer)))
        for peer, work in works:
            self._finish(peer, work, FOREVER if idle else timedelta(seconds=self.patience))

    def post(self, x, to):
        if len(self.posted) >= AHEAD:
            self._finish(*self.posted.pop(0)[:2], timedelta(seconds=self.patience))
        self.posted.append((to, self._start(self.library.isend, x, to), x))

    def sum(self, x, peers):
        if len(peers) == 1 or isinstance(x, np.ndarray) or x.device.type == "cpu":
            return super().sum(x, peers)
        self.sent["sum"] += x.nbytes * 2 * (len(peers) - 1) // len(peers)
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

    def _finish(self, peer: int, work, patience: timedelta) -> None:
        try:
            work.wait(patience)
        except RuntimeError as error:
            raise self._gone(peer, error) from None

    def _gone(self, peer: int, error: Exception) -> Exception:
        """Why a peer is not there: what a rank said that stopped, or how the connection ended."""
        self.missed = peer
        silent = "imed out" in str(error)
        if silent:
            self._ask(self.store.set, WAITS.format(self.rank), str(peer))
        if alarm := self._ask(self._hear, GRACE if silent else 2 * GRACE):  # the lost may have waited in vain
            return alarm
        return self.silent(culprits([peer], self._ask(self._waits) or {})) if silent else self.lost(peer)

    def _hear(self, seconds: float) -> Exception | None:
        """An alarm that is there, or comes in time."""
        until = time.monotonic() + seconds
        while not self.store.check([ALARM]):
            if time.monotonic() > until:
                return None
            time.sleep(0.02)
        rank, _, why = self.store.get(ALARM).decode().partition(" ")
        return self.stopped(int(rank), why)

    def _waits(self) -> dict[int, list[int]]:
        """Ranks that have waited in vain, and for whom."""
        keys = {rank: WAITS.format(rank) for rank in range(self.count)}
        return {rank: [int(self.store.get(key))] for rank, key in keys.items() if self.store.check([key])}

    def at_work(self):
        if time.monotonic() - self.told > self.patience / 4:
            self.told = time.monotonic()
            self._ask(self.store.add, AT_WORK.format(self.rank), 1)

    def ready(self):
        self.verb = "ready"
        self._ask(self.store.set, READY.format(self.rank), "")
        others = [rank for rank in range(self.count) if rank != self.rank]
        heard = dict.fromkeys(others, (0, time.monotonic()))  # how often, and when at last
        while missing := [rank for rank in heard if not self._ask(self.store.check, [READY.format(rank)])]:
            if alarm := self._ask(self._hear, 0):
                raise alarm
            for rank in missing:
                often, now = self._ask(self.store.add, AT_WORK.format(rank), 0) or 0, time.monotonic()
                if often > heard[rank][0]:
                    heard[rank] = often, now
                if now - heard[rank][1] > self.patience:
                    raise self.silent([rank])
            time.sleep(0.05)

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

    def leave(self, code):
        if code:
            os._exit(code)
        for peer, work, _ in self.posted:
            self._finish(peer, work, timedelta(seconds=self.patience))
        self.library.destroy_process_group()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

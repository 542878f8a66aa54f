"""Ranks over torch.distributed, under torchrun: gloo between processors, NCCL between GPUs."""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta

import numpy as np

from refengine.comm import AHEAD, PATIENCE, Ranks, total
from spec.config import InputError

ALARM = "refengine/alarm"
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
            library.init_process_group(
                "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=patience)
            )
            self.store = library.distributed_c10d._get_default_store()
        except Exception as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise InputError(
                f"the {count} ranks did not meet at {where} within {patience:g} s ({first_line(error)})"
            ) from None
        self.groups: dict[tuple[int, ...], object] = {}
        self.posted: list = []  # (peer, work, array) under way

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

    def _gone(self, peer: int, error: Exception):
        """Why a peer is not there: what it said itself, or how the connection ended."""
        until = time.monotonic() + GRACE / 2
        with contextlib.suppress(Exception):
            while time.monotonic() < until:
                if self.store.check([ALARM]):
                    rank, _, why = self.store.get(ALARM).decode().partition(" ")
                    return self.stopped(int(rank), why)
                time.sleep(0.02)
        return self.silent([peer]) if "imed out" in str(error) else self.lost(peer)

    def alarm(self, why):
        with contextlib.suppress(Exception):
            if not self.store.check([ALARM]):
                self.store.set(ALARM, f"{self.rank} {why}")
        time.sleep(GRACE)

    def leave(self, code):
        if code:
            os._exit(code)
        for peer, work, _ in self.posted:
            self._finish(peer, work, timedelta(seconds=self.patience))
        self.library.destroy_process_group()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

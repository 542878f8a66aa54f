"""The connection of this process: which kind, by how it was started, and how it ends."""

from __future__ import annotations

import os
import signal
import sys

from refengine.comm import PATIENCE, Ranks, Solo
from refengine.place import place

current: Ranks = Solo()  # this process has one connection at most


def connect(patience: float = PATIENCE, device: str = "cpu", deterministic: bool = False) -> Ranks:
    """Meet the other ranks; InputError when a library is missing or they do not come."""
    global current
    if place().count > 1:
        signal.signal(signal.SIGTERM, ended)  # what launchers send to the ranks that are left
    match place().launcher:
        case "torchrun":
            from refengine.comm.torch_distributed import TorchDistributed

            current = TorchDistributed(patience, device, deterministic)
        case "mpiexec":
            from refengine.comm.mpi import MPI

            current = MPI(patience)
    return current


def ended(*_) -> None:
    text = f"refengine, rank {place().rank}: ended by the launcher, because another rank ended\n"
    os.write(2, text.encode())
    os._exit(1)


def leave(code: int, why: str = "") -> None:
    """Before this process exits with `code`: the others hear why, if it has failed."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if code and current.count == 1 and place().launcher == "mpiexec":
        connect()  # mpiexec lets the others wait for a rank that ends before it has come
    if code:
        current.alarm(why)
    current.leave(code)

"""The connection of this process: which kind, by how it was started, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

from refengine.ranks.comm import TIMEOUT, Ranks, Solo
from refengine.ranks.launcher import launched, report_termination
from refengine.spec.config import InputError

current: Ranks = Solo()  # this process has one connection at most


def connect(timeout: float = TIMEOUT, device: str = "cpu", deterministic: bool = False) -> Ranks:
    """Meet the other ranks; InputError when a library is missing or they do not come."""
    global current
    if launched().count > 1:
        report_termination(lambda: "another rank" if current.missed is None else f"rank {current.missed}")
    match launched().launcher:
        case "torchrun":
            from refengine.ranks.comm.torch_distributed import TorchDistributed

            current = TorchDistributed(timeout, device, deterministic)
        case "mpiexec":
            from refengine.ranks.comm.mpi import MPI

            current = MPI(timeout)
    return current


def leave(code: int, why: str = "") -> None:
    """Before this process exits with `code`: the others hear why, if it has failed or nobody listens."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if code:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # why this rank ends is said
    if code and current.count == 1 and launched().launcher == "mpiexec":
        with contextlib.suppress(InputError):
            connect()  # mpiexec lets the others wait for a rank that ends before it has come
    if code and current.count == 1 and launched().launcher == "torchrun":
        time.sleep(1)  # torchrun ends the others at once: let them be far enough to say so
    unheard = current.count > 1 and not current.done and not code
    if code or (unheard and current.rank == 0):
        current.alarm(why)
    if unheard:
        os._exit(0)
    current.leave(code)

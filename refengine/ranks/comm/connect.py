"""Open and close the connection of this process; the launcher that started it decides its kind."""

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
    """Return the connection to the other ranks; InputError when a library or a rank is missing.

    timeout: in seconds. device, deterministic: as in refengine.load, for torch.distributed.
    """
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
    """Tell the other ranks why this one exits, on failure or on a broken pipe, and close the connection.

    Returns only if the caller is to exit with `code`; otherwise the process ends here.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    if code:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # send the reason first
    if code and current.count == 1 and launched().launcher == "mpiexec":
        with contextlib.suppress(InputError):
            connect()  # or the others would wait in MPI_Init for this rank
    if code and current.count == 1 and launched().launcher == "torchrun":
        time.sleep(1)  # torchrun ends the others at once: give them time to install their signal handler
    closed_early = current.count > 1 and not current.done and not code
    if code or (closed_early and current.rank == 0):
        current.alarm(why)
    if closed_early:
        os._exit(0)
    current.leave(code)

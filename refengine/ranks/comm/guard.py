"""A guard: a process beside a rank that ends it where the rank cannot end itself.

A rank that is stopped, or that waits in MPI_Init or MPI_Finalize, runs no Python code. The other ranks report
it and leave, but mpiexec ends a remaining rank only if another one leaves before MPI_Finalize; a rank stopped
later, or one for which no other rank waits, would keep the job running for ever.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOK = 0.25  # seconds between two looks at the rank
GRACE = 1.0  # seconds that the other ranks have to print their reason, before mpiexec ends them all
MARGIN = 3.0  # seconds over the timeout before a stopped rank is ended: the other ranks report it first


class Guard:
    """Start a process that kills this one if it exceeds a `limit` or is stopped (by SIGSTOP, for example).

    It ends with this process. `timeout` is in seconds; a stopped process is killed MARGIN later.
    """

    def __init__(self, rank: int, timeout: float):
        parent = os.getpid()
        reading, self.pipe = os.pipe()
        if not os.fork():
            try:
                os.close(self.pipe)
                _guard(reading, parent, rank, timeout)
            finally:
                os._exit(0)
        os.close(reading)

    @contextmanager
    def limit(self, done: str) -> Iterator[None]:
        """Run the block, by whose end all ranks have `done` something, within the timeout."""
        self._expect(done)
        try:
            yield
        finally:
            self._expect("")

    def _expect(self, done: str) -> None:
        with suppress(OSError):  # the guard is gone
            os.write(self.pipe, f"{done}\n".encode())


def _guard(pipe: int, parent: int, rank: int, timeout: float) -> None:
    """Watch the parent until it ends, which closes the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(
        AttributeError, OSError
    ):  # Linux: this process ends with its parent even while it is stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _close_all_but(pipe, *[2] * (not Path("/proc/self/fd").exists()))
    expected, late, stopped, looked = "", 0.0, 0.0, monotonic()
    while True:
        if select.select([pipe], [], [], LOOK)[0]:
            text = os.read(pipe, 1024).decode()
            if not text:
                return
            expected, late = text.splitlines()[-1], 0.0
        # A tick is LOOK even where more time has passed: perhaps this process was stopped too.
        tick, looked = min(monotonic() - looked, 2 * LOOK), monotonic()
        late = late + tick if expected else 0.0
        stopped = stopped + tick if _is_stopped(parent) else 0.0
        if late > timeout:
            return _end(parent, rank, f"not all ranks {expected} within {timeout:g} s")
        if stopped > timeout + MARGIN:
            return _end(parent, rank, f"this process was stopped for {stopped:.0f} s")


def _close_all_but(*kept: int) -> None:
    """Close inherited files: an open end would hide from mpiexec that this rank has ended."""
    start = 0
    for fd in sorted(kept):
        os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, os.sysconf("SC_OPEN_MAX"))


def _is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal; False where the system does not show it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _end(pid: int, rank: int, why: str) -> None:
    """Print the reason on the stderr of a process, and kill it."""
    with suppress(OSError):
        fd = os.open(f"/proc/{pid}/fd/2", os.O_WRONLY) if Path("/proc/self/fd").exists() else 2
        os.write(fd, f"refengine, rank {rank}: {why}\n".encode())
    time.sleep(GRACE)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)

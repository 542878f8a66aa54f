"""How this process was started: alone, by mpiexec, or by torchrun; and what that means for it.

Both launchers say by environment variables which rank a process is. Nothing is imported for that, so a usage
error is answered at once.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPIEXEC = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and its relatives
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # Open MPI
)


@dataclass(frozen=True)
class Launch:
    """Where a process stands among all that were started, and among those of its machine."""

    launcher: str = ""
    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def launched() -> Launch:
    if {"MASTER_ADDR", *TORCHRUN[:2]} <= os.environ.keys():
        return Launch("torchrun", *_numbers(TORCHRUN))
    for names in MPIEXEC:
        if set(names[:2]) <= os.environ.keys():
            return Launch("mpiexec", *_numbers(names))
    return Launch()


def _numbers(names: tuple[str, ...]) -> list[int]:
    return [int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0, 1), strict=True)]


def report_termination(who=lambda: "another rank") -> None:
    """What launchers send to the ranks that are left, SIGTERM, gets a sentence, and exit code 1."""

    def ended(*_) -> None:
        text = f"refengine, rank {launched().rank}: ended by the launcher, because {who()} ended\n"
        os.write(2, text.encode())
        os._exit(1)

    signal.signal(signal.SIGTERM, ended)

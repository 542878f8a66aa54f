"""The launcher of this process (none, mpiexec or torchrun) and its rank, read from environment variables.

This module imports no library of ranks, so a usage error is reported without delay.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as shown

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPIEXEC = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and its relatives
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # Open MPI
)


@dataclass(frozen=True)
class Launch:
    """Hold the launcher, the rank of this process and the number of ranks, in the job and on this host."""

    launcher: str = ""
    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def launched() -> Launch:
    """Return how this process was launched: rank 0 of 1 without a launcher.

    Raises InputError for a variable of a launcher that is no such number.
    """
    if {"MASTER_ADDR", *TORCHRUN[:2]} <= os.environ.keys():
        return Launch("torchrun", *_numbers(TORCHRUN))
    for names in MPIEXEC:
        if set(names[:2]) <= os.environ.keys():
            return Launch("mpiexec", *_numbers(names))
    return Launch()


def _numbers(names: tuple[str, ...]) -> list[int]:
    """Return the values of four variables: rank and count, of the job and of this host."""
    values = [os.environ.get(name, default) for name, default in zip(names, "0101", strict=True)]
    for name, value, least in zip(names, values, (0, 1, 0, 1), strict=True):
        if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) >= least):
            raise _wrong(f"{name} = {shown(value)} is not a whole number from {least} on")
    rank, count, *local = map(int, values)
    if rank >= count:
        raise _wrong(f"{names[0]} = {rank} is not below {names[1]} = {count}")
    return [rank, count, *local]


def _wrong(what: str) -> Exception:
    """Return the error for a variable of a launcher."""
    from refengine.spec.keys import InputError  # imports NumPy

    return InputError(
        f"the environment variable {what}: start the ranks with mpiexec or torchrun, or unset it"
    )


def report_termination(who: Callable[[], str] = lambda: "another rank") -> None:
    """Install a handler of SIGTERM, with which launchers end the remaining ranks: one sentence, exit code 1.

    who: returns the rank whose end is the cause, for the sentence.
    """

    def ended(*_) -> None:
        text = f"refengine, rank {launched().rank}: ended by the launcher, because {who()} ended\n"
        os.write(2, text.encode())
        os._exit(1)

    signal.signal(signal.SIGTERM, ended)

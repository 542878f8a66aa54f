"""Numbers for people: bytes, counts, seconds, and what the process has used."""

from __future__ import annotations

import contextlib
import resource
import sys


def peak_memory() -> int:
    """The most memory this process has held at once, in bytes.

    Linux hands getrusage's figure on from whoever started the process; /proc has the process's own.
    """
    try:
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """From here on `peak_memory` counts anew, where the system has a way to say so."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as what:
        what.write("5")


def bytes_text(count: float) -> str:
    """1536 -> '1.5 KB': powers of 1000, as vendors and disks count."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def count_text(count: float) -> str:
    """31577940288 -> '31.6 B'"""
    for unit in ("", "K", "M", "B", "T"):
        if abs(count) < 1000 or unit == "T":
            return f"{count:.3g} {unit}".strip() if unit else f"{count:.0f}"
        count /= 1000
    raise AssertionError

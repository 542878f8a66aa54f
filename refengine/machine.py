"""Processors and memory: those of this machine, and those that this process uses."""

from __future__ import annotations

import contextlib
import os
import sys

UNKNOWN = 4 * 2**30  # bytes of memory taken as available where the system does not say


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes that can be had without swapping, as far as the system tells."""
    try:
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return UNKNOWN


def peak_memory() -> int:
    """Return the most memory this process has held at once, in bytes; 0 where the system does not say.

    On Linux a child inherits the figure of getrusage from its parent; /proc has the process's own.
    """
    try:
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Start the count of `peak_memory` anew, where the system has a way to do so."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as what:
        what.write("5")

"""Processors and memory: those of this machine, and those that this process uses."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 4 * 2**30  # bytes of memory taken as available where the system does not say


def processors() -> int:
    """Return the number of processors that this process may use, by its affinity and its cgroup's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(count, quota() + 0.5)))


def quota(root: str = "/") -> float:
    """Return the processors that the cgroups of this process may take together, or infinity."""
    return min(map(_limit, _cgroups("cpu", root)), default=float("inf"))


def _cgroups(controller: str, root: str) -> Iterator[Path]:
    """Yield the folders of the cgroups of this process that may limit what a controller counts."""
    try:
        with open(Path(root, "proc/self/cgroup")) as cgroup:
            lines = cgroup.read().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, own = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        for top in {Path(root, "sys/fs/cgroup", names), Path(root, "sys/fs/cgroup", names and controller)}:
            yield from [top, *(top / part for part in _prefixes(own))]


def _prefixes(path: str) -> list[str]:
    """Return "a", "a/b", ... of a path "/a/b/..."."""
    parts = [part for part in path.split("/") if part]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _limit(folder: Path) -> float:
    """Return the processors that one cgroup may take, by the files of version 2 or 1; or infinity."""
    with contextlib.suppress(OSError, ValueError):
        allowed, period = (folder / "cpu.max").read_text().split()
        if allowed != "max":
            return float(allowed) / float(period)
    with contextlib.suppress(OSError, ValueError):
        allowed = (folder / "cpu.cfs_quota_us").read_text()
        if float(allowed) > 0:
            return float(allowed) / float((folder / "cpu.cfs_period_us").read_text())
    return float("inf")


def _room(folder: Path) -> float:
    """Return the bytes that one cgroup may still take, by the files of version 2 or 1; or infinity.

    File pages that were not used lately count as free: the kernel reclaims them at the limit.
    """
    for most, used, unused in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            left = int((folder / most).read_text()) - int((folder / used).read_text())
            return max(0, left + _number(folder / "memory.stat", unused))
    return float("inf")


def _number(file: Path, name: str) -> int:
    """Return the number after a name in a file of such lines; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(dict(line.split() for line in file.read_text().splitlines())[name])
    return 0


def available_memory(root: str = "/") -> int:
    """Return the bytes that can be had without swapping and within the limits of the cgroups."""
    return int(min([_free(root), *map(_room, _cgroups("memory", root))]))


def _free(root: str) -> int:
    """Return the bytes that can be had without swapping, as far as the system tells."""
    try:
        with open(Path(root, "proc/meminfo")) as meminfo:
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

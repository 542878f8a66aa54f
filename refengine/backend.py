"""Which backend computes: a name becomes a `spec.ops.Backend`, imported only when it is chosen."""

from __future__ import annotations

import os

import numpy as np

from spec.config import Config, InputError
from spec.ops import Backend, numpy_backend
from spec.tensors import parameters, table

BACKENDS = ("numpy",)


def make(name: str, cfg: Config, dtype: str = "float32", device: str = "cpu") -> Backend:
    """The backend called `name`, computing in `dtype` on `device`; InputError says what there is instead."""
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is not in this version; there is {', '.join(BACKENDS)}")
    if dtype not in ("float32", "float64"):
        raise InputError(f"the numpy backend computes in float32 or float64, not in {dtype}")
    if device not in ("cpu", "auto"):
        raise InputError(f"the numpy backend runs on the cpu, not on {device!r}")
    return numpy_backend(np.dtype(dtype), resident=fits(cfg, np.dtype(dtype)))


def fits(cfg: Config, dtype: np.dtype) -> bool:
    """Whether all weights, widened to `dtype`, take at most half of the memory that is free now.

    If not, they stay in the file's dtype in the memory map, and one matrix or expert at a time is widened.
    """
    return parameters(table(cfg)) * dtype.itemsize <= available_memory() / 2


def available_memory() -> int:
    """Bytes that can be had without swapping, as far as the system tells."""
    try:
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

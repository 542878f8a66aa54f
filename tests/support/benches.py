"""The backends under test, each in one precision. A line in `BENCHES` adds a backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

from refengine.conformance.candidate import BUILT_IN, Bench, bench
from tools.cuda.emulator import EmulatedDevice, compiler

__all__ = ["BENCHES", "Bench", "bench", "marks"]


def torch_bench(name: str) -> Bench:
    from tests.support.torch_benches import TORCH  # which imports this file

    return TORCH[name]()


def cpu_bench(dtype: str) -> Bench:
    """Return the compiled loops with weights of this dtype if the file has bfloat16, and two threads."""
    from refengine.backends.cpu import cpu_backend

    backend = cpu_backend("float32", threads=2)
    if dtype == "float32":
        wide = partial(widened, backend.place)
        backend = replace(backend, place=wide)
    return bench(f"cpu-{dtype}", backend, "float32")


def widened(place, group, values):
    return place(group, [value.astype(np.float32) for value in values])


def cuda_bench() -> Bench:
    """Return the CUDA kernels on the emulator."""
    from refengine.backends.cuda import cuda_backend

    return bench("cuda-float32", cuda_backend("float32", EmulatedDevice()), "float32")


BENCHES: dict[str, Callable[[], Bench]] = dict(BUILT_IN)
if shutil.which("c++"):
    BENCHES |= {f"cpu-{dtype}": partial(cpu_bench, dtype) for dtype in ("float32", "bfloat16")}
if compiler():
    BENCHES["cuda-float32"] = cuda_bench
if find_spec("torch"):
    for name in ("torch-float32", "torch-float32-plain"):
        BENCHES[name] = partial(torch_bench, name)

QUICK = {"numpy-float32", "cpu-float32"}
THOROUGH = {"numpy-float64", "definition-float32"}  # by default each form of the operations has one precision


def marks(name: str) -> tuple:
    """Return the marks of a law of drawn examples on this backend; recorded vectors need none."""
    return (pytest.mark.thorough,) if name in THOROUGH else () if name in QUICK else (pytest.mark.slow,)

"""The backends under test, each in one precision. A new backend is one more line in `BENCHES`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from refengine.conformance.candidate import BUILT_IN, Bench, bench
from tools.cuda.emulator import EmulatedDevice, compiler

__all__ = ["BENCHES", "Bench", "bench"]


def torch_bench(name: str) -> Bench:
    from tests.support.torch_benches import TORCH  # which imports this file

    return TORCH[name]()


def cuda_bench() -> Bench:
    """The CUDA kernels, on the emulator."""
    from refengine.backends.cuda import cuda_backend

    return bench("cuda-float32", cuda_backend("float32", EmulatedDevice()), "float32")


BENCHES: dict[str, Callable[[], Bench]] = dict(BUILT_IN)
if compiler():
    BENCHES["cuda-float32"] = cuda_bench
if find_spec("torch"):
    for name in ("torch-float32", "torch-float32-plain"):
        BENCHES[name] = partial(torch_bench, name)

"""Choose a backend: a name becomes a `Backend` of the spec, imported only when it is chosen."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from importlib.util import find_spec

import numpy as np

from refengine.machine import available_memory, processors
from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import Config, InputError
from refengine.spec.ops import REFERENCE, Backend, numpy_backend
from refengine.spec.quant import with_packed_inputs
from refengine.spec.tensors import parameters, table

NAMES = ("numpy", "torch", "cuda", "cpu", "auto")
MOST_THREADS = 1024  # far more end the process inside a library


def make(
    name: str,
    cfg: Config,
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    deterministic: bool = False,
    share: float = 1.0,
    packed: bool = False,
    batch_invariant: bool = False,
    kv: str | None = None,
    ssm: str | None = None,
    packed_inputs: bool = False,
) -> Backend:
    """Return the backend called `name`, computing in `dtype` on `device`; InputError names what there is.

    device: None is the first CUDA device for the cuda backend, and the processor for the others.
    threads: None is the processors that this process may use.
    share: how much of the weights this machine is to hold, of all there are.
    packed: whether the checkpoint has packed weights: all weights then stay as they are in the files (numpy,
        torch).
    batch_invariant: the same bits of a row's logits in any batch; the cpu backend alone has this mode.
    kv, ssm: the dtypes in which keys and values, and S, are stored; None: as the backend computes.
    packed_inputs: inputs of packed weights are packed too, as in W4A4; the numpy backend alone has this mode.
    """
    check_threads(threads)
    if name == "auto":
        name = automatic(device, dtype, batch_invariant=batch_invariant, packed_inputs=packed_inputs)[0]
    if batch_invariant and name in NAMES and name != "cpu":
        raise InputError(f"the {name} backend has no batch-invariant mode; --backend cpu has one")
    if packed_inputs and name in NAMES and name != "numpy":
        raise InputError(f"the {name} backend does not pack inputs; --backend numpy does")
    if name == "cuda":
        from refengine.backends.cuda import cuda_backend

        return cuda_backend(dtype, "cuda" if device is None else device, cfg, ssm or "float32", share, kv)
    device = "cpu" if device is None else device
    if name == "numpy":
        if dtype not in ("float32", "float64"):
            other = "; --backend torch does" if dtype in ITEMSIZE else ""
            raise InputError(f"the numpy backend computes in float32 or float64, not in {dtype}{other}")
        if device not in ("cpu", "auto"):
            raise InputError(f"the numpy backend runs on the cpu, not on {device!r}")
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads or processors())
        ops = with_packed_inputs(REFERENCE) if packed_inputs else REFERENCE
        return numpy_backend(np.dtype(dtype), not packed and fits(cfg, dtype, share), ops, kv=kv, ssm=ssm)
    if name == "cpu":
        if device not in ("cpu", "auto"):
            raise InputError(f"the cpu backend runs on the cpu, not on {device!r}")
        from refengine.backends.cpu import cpu_backend

        return cpu_backend(dtype, threads or processors(), batch_invariant, kv, ssm)
    if name == "torch":
        first = "torch" not in sys.modules
        try:
            from refengine.backends.pytorch import torch_backend
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise InputError("the torch backend needs PyTorch: pip install 'refengine[torch]'") from None
        if first:  # its import leaves a circle of references that holds the frames of all callers
            gc.collect()
        if threads is None and processors() < (os.cpu_count() or 1):  # PyTorch knows no quota
            threads = processors()
        resident = not packed and fits(cfg, dtype, share)
        compute = "float32" if packed and device == "cpu" else None  # by the loops of backends/cpu
        return torch_backend(dtype, device, threads, deterministic, resident, compute, kv=kv, ssm=ssm)
    raise InputError(f"there is no backend {name!r}; there is {', '.join(NAMES)}")


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads that a library would end the process at."""
    if threads is not None and not (type(threads) is int and 1 <= threads <= MOST_THREADS):
        raise InputError(f"threads = {threads!r} is not a whole number from 1 to {MOST_THREADS}")


def automatic(
    device: str | None = None,
    dtype: str = "float32",
    ranks: int = 1,
    batch_invariant: bool = False,
    packed_inputs: bool = False,
) -> tuple[str, str]:
    """Return the backend that "auto" means here for so many ranks, and the reason in a few words."""
    if packed_inputs:
        return "numpy", "the only one that packs inputs"
    if batch_invariant:
        return "cpu", "the only one with a batch-invariant mode"
    if dtype == "float64":
        return "numpy", "which computes in float64"
    if ranks > 1 and device not in (None, "cpu"):
        return "torch", "which runs on the GPUs of several ranks"
    device = "cpu" if ranks > 1 else device
    if device in (None, "auto") or device.startswith("cuda"):
        if cuda_devices():
            return "cuda", "there are CuPy and a GPU"
        if device and device.startswith("cuda"):
            return "torch", "for a CUDA device without CuPy"
    from refengine.backends.cpu import native

    if native.load():
        return "cpu", "no CuPy with a GPU"
    if find_spec("torch"):
        return "torch", "no C++ compiler for the cpu backend"
    return "numpy", "no C++ compiler for the cpu backend, and no PyTorch"


def cuda_devices() -> int:
    """Return how many GPUs the driver has for CuPy; 0 without either. Nothing heavy is imported."""
    if not find_spec("cupy"):
        return 0
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        count = ctypes.c_int()
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else count.value


def fits(cfg: Config, dtype: str, share: float = 1.0) -> bool:
    """Return whether the weights, widened to `dtype`, take at most half of the memory that is free now.

    If not, they stay in the file's dtype in the memory map, and one matrix or expert at a time is widened.
    """
    return share * parameters(table(cfg)) * ITEMSIZE.get(dtype, 4) <= available_memory() / 2

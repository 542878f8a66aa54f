"""Which backend computes: a name becomes a `Backend` of the spec, imported only when it is chosen."""

from __future__ import annotations

import numpy as np

from refengine.machine import available_memory
from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import Config, InputError
from refengine.spec.ops import Backend, numpy_backend
from refengine.spec.tensors import parameters, table

NAMES = ("numpy", "torch", "cuda")
MOST_THREADS = 1024  # far more end the process inside a library


def make(
    name: str,
    cfg: Config,
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    deterministic: bool = False,
    share: float = 1.0,
) -> Backend:
    """The backend called `name`, computing in `dtype` on `device`; InputError says what there is instead.

    device: None is the first CUDA device for the cuda backend, and the processor for the others.
    share: how much of the weights this machine is to hold, of all there are.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(f"threads = {threads} is not a number from 1 to {MOST_THREADS}")
    if name == "cuda":
        from refengine.backends.cuda import cuda_backend

        return cuda_backend(dtype, "cuda" if device is None else device, cfg, share=share)
    device = "cpu" if device is None else device
    if name == "numpy":
        if dtype not in ("float32", "float64"):
            other = "; --backend torch does" if dtype in ITEMSIZE else ""
            raise InputError(f"the numpy backend computes in float32 or float64, not in {dtype}{other}")
        if device not in ("cpu", "auto"):
            raise InputError(f"the numpy backend runs on the cpu, not on {device!r}")
        return numpy_backend(np.dtype(dtype), resident=fits(cfg, dtype, share))
    if name == "torch":
        try:
            from refengine.backends.pytorch import torch_backend
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise InputError("the torch backend needs PyTorch: pip install 'refengine[torch]'") from None
        return torch_backend(dtype, device, threads, deterministic, resident=fits(cfg, dtype, share))
    raise InputError(f"there is no backend {name!r}; there is {', '.join(NAMES)}")


def fits(cfg: Config, dtype: str, share: float = 1.0) -> bool:
    """Whether the weights, widened to `dtype`, take at most half of the memory that is free now.

    If not, they stay in the file's dtype in the memory map, and one matrix or expert at a time is widened.
    """
    return share * parameters(table(cfg)) * ITEMSIZE.get(dtype, 4) <= available_memory() / 2

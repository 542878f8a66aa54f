"""Checks of the machine: each raises InputError, one sentence, for what is missing."""

from __future__ import annotations

from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import InputError, first_line
from refengine.spec.tensors import parameters, table

OLDEST = 80  # the compute capability that has bfloat16 and cp.async
ROOM = 0.9  # of the free memory for weights; the rest is for states, and for what lies between launches


def imported():
    """Return the module cupy; InputError names the command that installs it."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise
        raise InputError("the cuda backend needs CuPy: pip install 'refengine[cuda]'") from None
    except ImportError as error:
        raise InputError(f"CuPy is installed but does not start: {first_line(error)}") from None
    return cupy


def check_driver(runtime) -> None:
    """Raise InputError if the driver is too old for `runtime` (cupy.cuda.runtime; 13020 is CUDA 13.2)."""
    have, wanted = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if not have:
        raise InputError("the cuda backend needs an NVIDIA driver, and this machine has none")
    if have // 1000 < wanted // 1000:
        raise InputError(
            f"the NVIDIA driver is made for CUDA {have // 1000}.{have % 1000 // 10}, and this CuPy for CUDA "
            f"{wanted // 1000}: a newer driver is needed, or cupy-cuda{have // 1000}x"
        )
    try:
        runtime.getDeviceCount()
    except RuntimeError as error:
        raise InputError(f"the NVIDIA driver finds no CUDA device: {first_line(error)}") from None


def check_libraries(cupy) -> None:
    """Raise InputError if NVRTC or cuBLAS, which are not part of CuPy, cannot be loaded."""
    try:
        cupy.cuda.cublas.CUBLAS_OP_T, cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError, AttributeError):
        raise InputError("CuPy does not find NVRTC or cuBLAS: pip install 'cupy-cuda13x[ctk]'") from None


def check_capability(name: str, capability: str) -> None:
    """Raise InputError if the device is older than sm_80."""
    if int(capability) < OLDEST:
        raise InputError(
            f"{name} is of architecture sm_{capability}, and the kernels need sm_{OLDEST} (Ampere) or newer"
        )


def find_index(name: str) -> int:
    """Return N of "cuda:N", 0 for "cuda" and "auto"; InputError for other names."""
    kind, colon, index = name.partition(":")
    if name == "auto":
        return 0
    if kind != "cuda" or (colon and not index.isdigit()):
        raise InputError(f"the cuda backend runs on cuda or cuda:N, not on {name!r}")
    return int(index or 0)


def check_room(cfg, dtype: str, device, share: float = 1.0) -> None:
    """Raise InputError if this share of the weights does not fit; it names what fits instead."""
    held, (free, _) = share * parameters(table(cfg)), device.memory
    if held * ITEMSIZE[dtype] <= ROOM * free:
        return
    fits = ROOM * free / ITEMSIZE[dtype] / share
    narrow = dtype == "float32" and held * ITEMSIZE["bfloat16"] <= ROOM * free
    advice = "; in bfloat16 this one does" if narrow else ""
    raise InputError(
        f"the model has {gib(held * ITEMSIZE[dtype])} of weights in {dtype}, and {device.name} has "
        f"{gib(free)} free: a model of up to {fits / 1e9:.2f} billion parameters fits{advice}"
    )


def gib(nbytes: int) -> str:
    """Return bytes as text in GiB."""
    return f"{nbytes / 2**30:.2f} GiB"

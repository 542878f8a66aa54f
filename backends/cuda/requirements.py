"""What a machine may lack, each in a sentence."""

from __future__ import annotations

from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import InputError, first_line
from refengine.spec.tensors import parameters, table

OLDEST = 80  # the compute capability that has bfloat16 and cp.async
ROOM = 0.9  # of the free memory for weights; the rest is for states, and for what lies between launches


def imported():
    """CuPy."""
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
    """`runtime` is cupy.cuda.runtime; versions are 1000 major + 10 minor."""
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
    """NVRTC and cuBLAS, which are not part of CuPy."""
    try:
        cupy.cuda.cublas.CUBLAS_OP_T, cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError, AttributeError):
        raise InputError("CuPy does not find NVRTC or cuBLAS: pip install 'cupy-cuda13x[ctk]'") from None


def check_capability(name: str, capability: str) -> None:
    if int(capability) < OLDEST:
        raise InputError(
            f"{name} is of architecture sm_{capability}, and the kernels need sm_{OLDEST} (Ampere) or newer"
        )


def find_index(name: str) -> int:
    """cuda -> 0, cuda:N -> N"""
    kind, colon, index = name.partition(":")
    if name == "auto":
        return 0
    if kind != "cuda" or (colon and not index.isdigit()):
        raise InputError(f"the cuda backend runs on cuda or cuda:N, not on {name!r}")
    return int(index or 0)


def check_room(cfg, dtype: str, device, share: float = 1.0) -> None:
    """Whether this share of the weights fits; what fits instead."""
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
    return f"{nbytes / 2**30:.2f} GiB"

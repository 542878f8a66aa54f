"""A few loops in C++ for decoding on a CPU, compiled when they are first wanted and kept in the user's cache.

Without a compiler, or where the result does not run, `load()` is None and PyTorch does the same work more slowly;
docs/torch.md has both measured.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "kernels" / "decode.cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-fPIC", "-fopenmp")
P, I = ctypes.c_void_p, ctypes.c_int64
SIGNATURES = {
    "linear": (P, I, I, P, I, P, ctypes.c_int),
    "experts": (I, P, P, P, P, P, I, I, P, I, P, P, ctypes.c_int),
    "scan_step": (P, P, P, P, P, P, P, I, I, I, I, ctypes.c_int),
}


@lru_cache(maxsize=1)
def load() -> Native | None:
    """The compiled loops, or None."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    try:
        built = compiler and library(compiler)
        return built and Native(declared(ctypes.CDLL(str(built))))
    except (OSError, subprocess.SubprocessError):
        return None


def library(compiler: str) -> Path:
    """The shared object for this source, compiler and processor; compiled if it is not there yet."""
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (compiler, *FLAGS, processor()):
        digest.update(part.encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refengine"
    path = cache / f"decode-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            part, whole = Path(scratch) / "decode.o", Path(scratch) / "decode.so"
            run(compiler, *FLAGS, "-c", str(SOURCE), "-o", str(part))
            run(compiler, "-shared", str(part), "-o", str(whole))  # OpenMP itself is the one PyTorch has loaded
            whole.replace(path)
    return path


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def declared(built: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in SIGNATURES.items():
        function = getattr(built, name)
        function.argtypes, function.restype = arguments, None
    return built


class Native:
    """The loops with tensors as arguments: float32 and contiguous, but for the bfloat16 weights."""

    def __init__(self, built: ctypes.CDLL):
        self.built = built

    def linear(self, x, weight):
        """x [r i], weight [o i] -> [r o]"""
        y = torch.empty(len(x), len(weight))
        self.built.linear(
            weight.data_ptr(), len(weight), weight.shape[1], x.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads()
        )
        return y

    def experts(self, u, up, down, width: int, begin, token, weight):
        """u [t x]; addresses of the matrices [e] of the experts hit; their hits begin[e] .. begin[e + 1] -> [t x]"""
        y, inner = torch.zeros_like(u), torch.empty(len(token), width)
        pointers = (a.data_ptr() for a in (up, down, begin, token, weight))
        self.built.experts(
            len(up), *pointers, u.shape[1], width, u.data_ptr(), len(u), inner.data_ptr(), y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y

    def scan_step(self, S, decay, u, B, C):
        """S b h p n, decay b h, u b h p, B and C b g n -> y b h p, the next S"""
        b, h, p, n = S.shape
        y, after = torch.empty_like(u), torch.empty_like(S)
        pointers = (a.data_ptr() for a in (S, after, decay, u, B, C, y))
        self.built.scan_step(*pointers, b * h, p, n, h // B.shape[1], torch.get_num_threads())
        return y, after

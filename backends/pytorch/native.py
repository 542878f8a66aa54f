"""A few loops in C++ for decoding on a CPU, compiled when they are first wanted and kept in the user's cache.

Without a compiler, or where the result does not run, `load()` is None and PyTorch does the same work more
slowly; docs/torch.md has both measured.
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

from refengine.backends.pytorch.interface import declared

KERNELS = Path(__file__).parent / "kernels"
SOURCES = sorted(KERNELS.glob("*.cpp"))
FLAGS = (  # as fast as the order of sums is free, but with infinities and exact divisions
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math",
)  # fmt: skip


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Return the compiled loops, or None; InputError if they do not fit interface.py."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    try:
        return declared(ctypes.CDLL(str(library(compiler)))) if compiler else None
    except (OSError, subprocess.SubprocessError):
        return None


def library(compiler: str) -> Path:
    """Return the shared object for these sources, compiler and processor, compiled if it is not there yet."""
    texts = SOURCES + sorted(KERNELS.glob("*.h"))
    digest = hashlib.sha256(b"".join(text.read_bytes() for text in texts))
    for part in (compiler, *FLAGS, processor()):
        digest.update(part.encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refengine"
    path = cache / f"decode-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            objects, whole = [f"{scratch}/{source.stem}.o" for source in SOURCES], Path(scratch) / "decode.so"
            for source, compiled in zip(SOURCES, objects, strict=True):
                run(compiler, *FLAGS, "-c", str(source), "-o", compiled)
            run(compiler, "-shared", *objects, "-o", str(whole))  # OpenMP is the one PyTorch has loaded
            whole.replace(path)
    return path


def run(*command: str) -> None:
    """Run a compiler; SubprocessError where it fails or takes two minutes."""
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def processor() -> str:
    """Return what -march=native depends on: the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()

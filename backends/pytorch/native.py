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
    """The compiled loops, or None."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    try:
        built = compiler and library(compiler)
        return built and declared(ctypes.CDLL(str(built)))
    except (OSError, subprocess.SubprocessError):
        return None


def library(compiler: str) -> Path:
    """The shared object for these sources, compiler and processor; compiled if it is not there yet."""
    texts = SOURCES + sorted(KERNELS.glob("*.h"))
    digest = hashlib.sha256(b"".join(text.read_bytes() for text in texts))
    for part in (compiler, *FLAGS, processor()):
        digest.update(part.encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refengine"
    path = cache / f"decode-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            parts, whole = (
                [Path(scratch) / f"{source.stem}.o" for source in SOURCES],
                Path(scratch) / "decode.so",
            )
            for source, part in zip(SOURCES, parts, strict=True):
                run(compiler, *FLAGS, "-c", str(source), "-o", str(part))
            run(
                compiler, "-shared", *map(str, parts), "-o", str(whole)
            )  # OpenMP is the one PyTorch has loaded
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

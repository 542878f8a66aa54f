"""The compiled loops: a library for this processor, compiled on first use and kept in the user's cache.

Without a compiler, or where the result does not run, `load()` is None, and `missing()` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from refengine.backends.cpu.interface import declared

KERNELS = Path(__file__).parent / "kernels"
SOURCES = sorted(KERNELS.glob("*.cpp"))
FLAGS = (  # sums stay in the order in which they are written; exact divisions, infinities
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros",
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
    path = cache / f"cpu-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            objects, whole = [f"{scratch}/{source.stem}.o" for source in SOURCES], Path(scratch) / "cpu.so"
            run_all(
                [compiler, *FLAGS, "-c", str(source), "-o", compiled]
                for source, compiled in zip(SOURCES, objects, strict=True)
            )
            run(compiler, "-shared", "-pthread", *objects, "-o", str(whole))
            whole.replace(path)
    return path


def run_all(commands: Iterable[list[str]]) -> None:
    """Run compilers, as many at a time as there are processors; SubprocessError where one fails."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: run(*command), commands))


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

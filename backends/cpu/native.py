"""The compiled loops as a library: the one that a wheel carries, or one compiled on first use and kept.

A wheel has a library for each level of x86-64, of which the best that the processor has is loaded.
Otherwise the loops are compiled for this processor, which takes some seconds, and are kept in the user's
cache under a name that says of which sources, compiler and processor they are. The file ends with the
digest of all before it, so a damaged one is seen and compiled again. Processes that compile at once each
move a whole file into place.

Without a compiler, or where the result does not run, `load()` is None.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from refengine.backends.cpu import build
from refengine.backends.cpu.interface import declared

BUILT = Path(__file__).parent / "built"  # where a wheel has its libraries
LEVEL = "REFENGINE_CPU_LEVEL"  # a variable that chooses among them, for tests
DIGEST = 64  # bytes at the end of a file


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Return the compiled loops, or None; InputError if they do not fit interface.py."""
    with_wheel = carried()
    if with_wheel:
        try:
            return declared(ctypes.CDLL(str(with_wheel)))
        except OSError:
            pass  # made for another system
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    try:
        return opened(compiler) if compiler else None
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        first = said.decode(errors="replace").strip().partition("\n")[0]
        print(f"note: the loops of the cpu backend cannot be compiled: {first}", file=sys.stderr)
        return None


def carried() -> Path | None:
    """Return the library of a wheel for the best level that the processor has, or None."""
    flags = set(processor().split())
    for level, needed in build.LEVELS.items():
        path = BUILT / f"{level}.so"
        chosen = os.environ.get(LEVEL, level) == level
        if chosen and flags.issuperset(needed) and path.exists():
            return path
    return None


def opened(compiler: str) -> ctypes.CDLL:
    """Return the library from the cache, or from a temporary directory where the cache cannot be written."""
    try:
        return declared(ctypes.CDLL(str(library(compiler))))
    except OSError:
        with tempfile.TemporaryDirectory() as scratch:
            return declared(ctypes.CDLL(str(library(compiler, Path(scratch)))))


def library(compiler: str, cache: Path | None = None) -> Path:
    """Return the shared object for these sources, compiler and processor,
    compiled if it is not there whole."""
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refengine"
    path = cache / f"cpu-{name(compiler)}.so"
    if not whole(path):
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        print(f"note: compiling the loops of the cpu backend, once, into {cache}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / path.name
            build.compiled(compiler, build.HERE, made)
            with open(made, "ab") as file:
                file.write(digest(made.read_bytes()))
            made.replace(path)
    return path


def name(compiler: str) -> str:
    """Return a digest of all that the library depends on."""
    found = hashlib.sha256()
    for path in sorted(build.KERNELS.glob("*.*")):
        found.update(path.name.encode() + path.read_bytes())
    for part in (compiler, *build.FLAGS, *build.HERE, processor()):
        found.update(part.encode())
    return found.hexdigest()[:16]


def digest(data: bytes) -> bytes:
    """Return the bytes with which a file of these ends."""
    return hashlib.sha256(data).hexdigest().encode()


def whole(path: Path) -> bool:
    """Return whether there is a library of this user, as it was written."""
    try:
        data = path.read_bytes()
        mine = not hasattr(os, "getuid") or path.stat().st_uid in (0, os.getuid())
    except OSError:
        return False
    return mine and len(data) > DIGEST and digest(data[:-DIGEST]) == data[-DIGEST:]


@lru_cache(maxsize=1)
def processor() -> str:
    """Return what -march=native depends on: the processor's features."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()

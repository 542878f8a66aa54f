"""The compiled loops as a library: the one that a wheel carries, or one compiled on first use and kept.

A wheel has a library for each level of x86-64, of which the best that the processor has is loaded.
Otherwise the loops are compiled for this processor, which takes some seconds, and are kept in the user's
cache under a name that says of which sources, compiler and processor they are. The file ends with the
digest of all before it, so a damaged one is seen and compiled again. One process at a time compiles into the
cache, and the others wait; where files cannot be locked, each moves a whole file into place. Where the cache
cannot be written, or its disk is full, the loops are compiled into a temporary directory, each time.

Without a compiler, or where the result does not run, `load()` is None.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from refengine.backends.cpu import build
from refengine.backends.cpu.interface import declared
from refengine.spec.config import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BUILT = Path(__file__).parent / "built"  # where a wheel has its libraries
LEVEL = "REFENGINE_CPU_LEVEL"  # a variable that chooses among them, or the level to compile for; for tests
DIGEST = 64  # bytes at the end of a file
ROOM = 2**24  # bytes that a compiler may need on a disk


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Return the compiled loops, or None.

    InputError if they do not fit interface.py, or if a level was chosen that there is not.
    """
    level = os.environ.get(LEVEL)
    if level and level not in build.LEVELS:
        raise InputError(f"{LEVEL} = {level} is not one of {', '.join(build.LEVELS)}")
    if level and not has(level):
        raise InputError(f"{LEVEL} = {level}, which this processor does not have")
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
    for level in build.LEVELS:
        path = BUILT / f"{level}.so"
        chosen = (os.environ.get(LEVEL) or level) == level
        if chosen and has(level) and path.exists():
            return path
    return None


def has(level: str) -> bool:
    """Return whether the processor has what a level needs."""
    return set(processor().split()).issuperset(build.LEVELS[level])


def opened(compiler: str) -> ctypes.CDLL:
    """Return the library from the cache, or from a temporary directory where the cache cannot be used."""
    try:
        return declared(ctypes.CDLL(str(library(compiler))))
    except OSError as error:
        why = error.strerror or error
        print(f"note: {cache()} cannot be used ({why}), so what is compiled is not kept", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            return declared(ctypes.CDLL(str(library(compiler, Path(scratch)))))


def cache() -> Path:
    """Return the user's directory for libraries."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refengine"


def library(compiler: str, folder: Path | None = None) -> Path:
    """Return the shared object for these sources, compiler and processor, compiled if it is not there whole.

    OSError where the folder, by default the cache, cannot be written or its disk is full.
    """
    folder = folder or cache()
    path = folder / f"cpu-{name(compiler)}.so"
    if not whole(path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
            if whole(path):  # another process has compiled it meanwhile
                return path
            print(f"note: compiling the loops of the cpu backend, once, into {folder}", file=sys.stderr)
            made = Path(scratch) / path.name
            try:
                build.compiled(compiler, flags(), made)
            except subprocess.CalledProcessError as error:
                if shutil.disk_usage(folder).free < ROOM:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                raise
            with open(made, "ab") as file:
                file.write(digest(made.read_bytes()))
            made.replace(path)
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time compile into a folder, so that ranks compile once together."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: each compiles for itself
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def flags() -> tuple[str, ...]:
    """Return the flags for this processor, or for the level that was chosen."""
    level = os.environ.get(LEVEL)
    return (f"-march={level}",) if level else build.HERE


def name(compiler: str) -> str:
    """Return a digest of all that the library depends on."""
    found = hashlib.sha256()
    for path in sorted(build.KERNELS.glob("*.*")):
        found.update(path.name.encode() + path.read_bytes())
    for part in (compiler, *build.FLAGS, *flags(), processor()):
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

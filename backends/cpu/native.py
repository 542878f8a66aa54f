"""Load the compiled loops as a library: that of the wheel, or one that is compiled at first use and kept.

A wheel has a library for each level of x86-64; the best one that the processor supports is loaded. Otherwise
the loops are compiled for this processor, which takes some seconds, and kept in the user's cache. The file
name is a digest of sources, compiler and processor. The file ends with the digest of its contents, so a
damaged one is detected and compiled again. One process at a time compiles into the cache, and the others
wait; without file locks, each process compiles and renames a whole file into place. If the cache cannot be
written, or its disk is full, the loops are compiled into a temporary directory, each time.

`load()` returns None if there is no compiler, or if the library does not run.
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

BUILT = Path(__file__).parent / "built"  # the libraries of a wheel
LEVEL = "REFENGINE_CPU_LEVEL"  # environment variable: the level to load or to compile for; for tests
DIGEST = 64  # bytes of the digest at the end of a file
ROOM = 2**24  # bytes of disk that a compiler may need


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Return the compiled loops, or None.

    Raises InputError if they do not match interface.py, or if the chosen level does not exist.
    """
    level = os.environ.get(LEVEL)
    if level and level not in build.LEVELS:
        raise InputError(f"{LEVEL} = {level} is not one of {', '.join(build.LEVELS)}")
    if level and not has(level):
        raise InputError(f"{LEVEL} = {level}, which this processor does not support")
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
    """Return the wheel's library for the best level that the processor supports, or None."""
    for level in build.LEVELS:
        path = BUILT / f"{level}.so"
        chosen = (os.environ.get(LEVEL) or level) == level
        if chosen and has(level) and path.exists():
            return path
    return None


def has(level: str) -> bool:
    """Return whether the processor supports a level."""
    return set(processor().split()).issuperset(build.LEVELS[level])


def opened(compiler: str) -> ctypes.CDLL:
    """Return the library from the cache, or from a temporary directory if the cache cannot be used."""
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
    """Return the library for these sources, compiler and processor; compile it if missing or damaged.

    Raises OSError if the folder (by default the cache) cannot be written, or if its disk is full.
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
    """Hold a lock, so that one process at a time compiles into a folder and ranks compile once."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: each process compiles
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def flags() -> tuple[str, ...]:
    """Return the compiler flags for this processor, or for the chosen level."""
    level = os.environ.get(LEVEL)
    return (f"-march={level}",) if level else build.HERE


def name(compiler: str) -> str:
    """Return a file name: a digest of everything that the library depends on."""
    found = hashlib.sha256()
    for path in sorted(build.KERNELS.glob("*.*")):
        found.update(path.name.encode() + path.read_bytes())
    for part in (compiler, *build.FLAGS, *flags(), processor()):
        found.update(part.encode())
    return found.hexdigest()[:16]


def digest(data: bytes) -> bytes:
    """Return the digest that follows these bytes at the end of the file."""
    return hashlib.sha256(data).hexdigest().encode()


def whole(path: Path) -> bool:
    """Return whether the file exists, belongs to this user or root, and is not damaged."""
    try:
        data = path.read_bytes()
        mine = not hasattr(os, "getuid") or path.stat().st_uid in (0, os.getuid())
    except OSError:
        return False
    return mine and len(data) > DIGEST and digest(data[:-DIGEST]) == data[-DIGEST:]


@lru_cache(maxsize=1)
def processor() -> str:
    """Return the processor's features, on which -march=native depends."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()

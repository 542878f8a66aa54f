"""Compile a kernel file for the CPU: a shared library (mode "fast") or a program (the sanitizers' modes).

What is built is kept in the user's cache under a name that depends on everything it was built from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = "clang++-19"
COMMON = (
    "-std=c++17",
    "-x",
    "c++",
    "-gline-tables-only",
    "-fno-omit-frame-pointer",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    f"-I{HERE}",
)
CHECKED = ("-O1", "-fno-unroll-loops")  # and without #pragma unroll: checked code is long enough as it is
MODES = {  # how kernels are compiled, and the macro that tells the runtime
    "fast": (("-O2", "-fPIC"), ()),
    "address": (
        (*CHECKED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("-DCHECK_ADDRESS",),
    ),
    "thread": ((*CHECKED, "-fsanitize=thread"), ("-DCHECK_THREAD",)),
}
RUNTIME = ("runtime", "meeting", "shared", "report")
PERTURB = ("-DPERTURB", "-ffp-contract=fast")
# `__shared__ float tile[32][33];` becomes a reference to an array that the runtime gives the block.
STATIC_ARRAY = re.compile(
    r"^(?P<indent>[ \t]*)__shared__\s+(?P<align>(?:__align__|alignas)\(\d+\)\s*)?(?P<type>[\w:<>, ]+?)\s+"
    r"(?P<name>\w+)\s*(?P<sizes>(?:\[[^\]]*\])*)\s*;",
    re.MULTILINE,
)

Entries = tuple[tuple[str, str], ...]  # (name, most threads of a block) of each entry point


class BuildError(Exception):
    """A kernel file that the compiler refuses."""


@cache
def compiler() -> str | None:
    """Return the path of clang++ 19, or None."""
    return shutil.which(os.environ.get("CUDA_ON_CPU_CXX", COMPILER))


@cache  # sources do not change while a process runs
def build(kernels: Path, name: str, entries: Entries, defines=(), mode="fast", perturb=False) -> Path:
    """Return the library or program for kernels/name.cu, compiled if it is not there yet."""
    flags = (*COMMON, *MODES[mode][0], *MODES[mode][1], *(f"-D{d}" for d in defines))
    if perturb:
        flags += (*PERTURB, *(("-march=x86-64-v3",) if has_fma() else ()))
    sources = {path.name: path.read_text() for path in sorted(kernels.glob("*.cuh"))}
    sources[f"{name}.cu"] = (kernels / f"{name}.cu").read_text()
    place = cached(name, *flags, str(entries), *sources, *sources.values(), *own_sources())
    with making(place) as scratch:
        if scratch:
            for file, text in sources.items():
                (scratch / file).write_text(f'#line 1 "{kernels / file}"\n{rewritten(text, mode)}')
            (scratch / "unit.cpp").write_text(unit(name, entries))
            run("-c", f"{scratch}/unit.cpp", "-o", f"{scratch}/unit.o", f"-I{scratch}", *flags)
            link(scratch, mode, perturb)
    return place


@contextmanager
def making(place: Path) -> Iterator[Path | None]:
    """Return the path at which to make the file of `place`; None if it is there. Other processes wait."""
    if place.exists():
        yield None
        return
    with open(place.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            yield Path(scratch)
            (Path(scratch) / "made").replace(place)
        place.with_suffix(".lock").unlink(missing_ok=True)


def unit(name: str, entries: Entries) -> str:
    """Return the source that is compiled: the language, the kernels, and the table of their entry points."""
    table = ", ".join(f'{{"{entry}", call<::{entry}>, {threads}}}' for entry, threads in entries)
    return (
        f'#include "cuda.h"\n#include "entries.h"\n#include "{name}.cu"\nnamespace cuda_on_cpu {{\n'
        f"const Entry entries[] = {{{table}}};\nconst int entry_count = {len(entries)};\n}}\n"
    )


def link(scratch: Path, mode: str, perturb: bool) -> None:
    door = "library" if mode == "fast" else "worker"
    objects = [str(scratch / "unit.o"), *(str(runtime(part, mode, perturb)) for part in (*RUNTIME, door))]
    kind = ("-shared",) if mode == "fast" else tuple(f for f in MODES[mode][0] if f.startswith("-fsanitize"))
    run(*objects, "-o", str(scratch / "made"), *kind, "-lm")


@cache
def runtime(part: str, mode: str, perturb: bool) -> Path:
    """Return the object of one of the emulator's own files, without any sanitizer."""
    flags = (*COMMON, "-O2", "-fPIC", "-fno-builtin", *MODES[mode][1], *(PERTURB if perturb else ()))
    place = cached(part, *flags, *own_sources())
    with making(place) as scratch:
        if scratch:
            run("-c", str(HERE / f"{part}.cpp"), "-o", f"{scratch}/made", *flags)
    return place


def rewritten(text: str, mode: str) -> str:
    """Return the source with its static __shared__ arrays made by the runtime; lines keep their numbers."""
    if mode != "fast":
        text = re.sub(r"#pragma unroll.*", "", text)

    def reference(found: re.Match) -> str:
        kind = found["type"] + found["sizes"]
        return f"{found['indent']}auto& {found['name']} = ::cuda_on_cpu::shared<{kind}>([] {{}});"

    return STATIC_ARRAY.sub(reference, text)


def run(*arguments: str) -> None:
    command = [compiler() or COMPILER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise BuildError(done.stderr)


@cache
def own_sources() -> tuple[str, ...]:
    return tuple(path.read_text() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp"))


def cached(name: str, *contents: str) -> Path:
    """Return the path of the file called `name` that is made from `contents`."""
    digest = hashlib.sha256("\0".join((compiler_version(), *contents)).encode()).hexdigest()
    return cache_directory() / f"{name}-{digest[:20]}"


@cache
def compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


@cache
def cache_directory() -> Path:
    """Return a directory in the user's cache, or one of this process where that cannot be written."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refengine" / "cuda_on_cpu"
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=place):
            return place
    except OSError:
        return Path(tempfile.mkdtemp(prefix="cuda_on_cpu-"))


@cache
def has_fma() -> bool:
    try:
        return " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False

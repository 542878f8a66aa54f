"""Compile the CUDA kernels with NVRTC, which needs no GPU, and read what it says of each.

NVRTC is given the options that CuPy gives it: nvcc chooses other numbers of registers, and accepts what NVRTC
does not.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import NamedTuple

from refengine.spec.config import InputError

KERNELS = Path(__file__).resolve().parents[2] / "backends" / "cuda" / "kernels"
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}  # bytes of a block
BUILDS = {
    "float32": (),
    "bfloat16": ("REAL_BF16",),
    "float16 state": ("REAL_BF16", "STATE_F16"),
    "float32 stays": ("STAYS",),
    "bfloat16 stays": ("REAL_BF16", "STAYS"),
    **{f"{size} bytes": (f"BYTES_{size}",) for size in (1, 2, 4, 8)},
}


class Use(NamedTuple):
    """The resources of one kernel in one build on one architecture."""

    file: str
    kernel: str
    build: str
    arch: str
    bound: int | None  # threads of a block: __launch_bounds__
    registers: int  # of a thread
    shared: int  # static bytes of a block
    stack: int  # bytes of a thread
    spills: int  # bytes stored and loaded

    def __str__(self):
        return f"{self.kernel} of {self.file}.cu ({self.build}, {self.arch})"


def nvrtc_version() -> str:
    """Return the version of NVRTC; InputError names what is not installed."""
    try:
        version("cuda-core"), version("cuda-bindings")
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'refengine[test]'") from None


def builds(source: Path) -> list[str]:
    """Return the builds of a file: two, or those of the scan's state, or one for each size of an element."""
    text = source.read_text()
    if "BYTES_1" in text:
        return [build for build in BUILDS if build.endswith("bytes")]
    plain = ["float32", "bfloat16", *(["float16 state"] if re.search(r"\bState\b", text) else [])]
    return plain + (["float32 stays", "bfloat16 stays"] if "STAYS" in text else [])


def compiled(source: Path, build: str, arch: str) -> tuple[str, str]:
    """Return the assembler's log, and the PTX it read."""
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    program = Program(
        source.read_text(),
        "c++",
        ProgramOptions(
            name=source.name,
            arch=arch,
            std="c++17",
            ftz=True,
            device_as_default_execution_space=True,
            include_path=[str(source.parent), str(KERNELS)],
            define_macro=list(BUILDS[build]) or None,
            ptxas_options=["-v", "--warn-on-spills"],
        ),
    )
    log = io.StringIO()
    try:
        program.compile("cubin", logs=log)
    except Exception as error:
        said = re.search(r"^.*\berror\b\s*:.*$", str(error), re.M) or re.match(r".*", str(error))
        sentence = f"{source.name} ({build}, {arch}) does not compile: {said.group().strip()}"
        raise InputError(sentence) from None
    ptx = b" " * nvrtc.nvrtcGetPTXSize(program.handle)[1]
    nvrtc.nvrtcGetPTX(program.handle, ptx)
    return log.getvalue(), ptx.decode()


def uses(source: Path, build: str, arch: str) -> list[Use]:
    """Return every kernel of a file."""
    log, ptx = compiled(source, build, arch)
    bounds = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*(?:\.maxntid ([\d, ]+))?", ptx))
    found = []
    for part in log.split("Compiling entry function ")[1:]:

        def total(pattern, part=part):
            return sum(int(number) for number in re.findall(pattern, part))

        kernel = re.match(r"'(\w+)'", part).group(1)
        bound = prod(int(size) for size in bounds[kernel].split(",")) if bounds[kernel] else None
        found += [
            Use(
                source.stem,
                kernel,
                build,
                arch,
                bound,
                total(r"Used (\d+) registers"),
                total(r"(\d+) bytes smem"),
                total(r"(\d+) bytes stack frame"),
                total(r"(\d+) bytes spill"),
            )
        ]
    return found


def with_headers(source: Path) -> str:
    """Return a file, and after it all that it includes."""
    text = source.read_text()
    for name in re.findall(r'^#include "([\w.]+)"', text, re.M):
        beside = source.parent / name
        text += with_headers(beside if beside.exists() else KERNELS / name)
    return text


def known_uses(source: Path, build: str, arch: str, cache: Path | None) -> tuple[list[Use], list[str]]:
    """Return a file's kernels, or a sentence on why there are none; from `cache` if nothing has changed."""
    of = f"{nvrtc_version()} {build} {arch} {source.stem}\n{with_headers(source)}"
    key = hashlib.sha256(of.encode()).hexdigest()
    kept = cache and cache / f"{key}.json"
    if kept and kept.exists():
        return [Use(*row) for row in json.loads(kept.read_text())], []
    try:
        found = uses(source, build, arch)
    except InputError as error:
        return [], [str(error)]
    if kept:
        kept.write_text(json.dumps(found))
    return found, []


def all_uses(folder: Path = KERNELS, cache: Path | None = None) -> tuple[list[Use], list[str]]:
    """Return every kernel, build and architecture, and a sentence for each file that does not compile."""
    jobs = [
        (file, build, arch, cache)
        for file in sorted(folder.glob("*.cu"))
        for build in builds(file)
        for arch in SHARED
    ]
    nvrtc_version()
    for module in ("cuda.core", "cuda.bindings.nvrtc"):  # which threads may not import side by side
        import_module(module)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # the compiler releases the interpreter
        done = list(pool.map(lambda job: known_uses(*job), jobs))
    return [use for found, _ in done for use in found], [sentence for _, said in done for sentence in said]

"""Compile the loops: for this processor, or for each level of x86-64 that a wheel carries.

The standard library alone, because setup.py runs this file before anything is installed.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from os import cpu_count
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
FLAGS = (  # sums stay in the order in which they are written; exact divisions, infinities
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-Wno-psabi",
)  # fmt: skip
HERE = ("-march=native",)
LEVELS = {  # of a wheel: what the flags of the processor must have, the best first
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi2"),
    "x86-64-v3": ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"),
    "x86-64": (),
}
PATIENCE = 300  # seconds that a compiler may take for a file


def sources() -> list[Path]:
    """Return the files that are compiled."""
    return sorted(KERNELS.glob("*.cpp"))


def compiled(compiler: str, flags: Iterable[str], path: Path) -> None:
    """Write the library to `path`, in one move; SubprocessError or OSError where that fails."""
    from concurrent.futures import ThreadPoolExecutor  # not where the library is there already

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects, whole = [f"{scratch}/{source.stem}.o" for source in sources()], Path(scratch) / "whole.so"
        each = [
            [compiler, *FLAGS, *flags, "-c", str(source), "-o", made]
            for source, made in zip(sources(), objects, strict=True)
        ]
        with ThreadPoolExecutor(cpu_count()) as pool:
            list(pool.map(run, each))
        run([compiler, "-shared", "-pthread", *objects, "-o", str(whole)])
        whole.replace(path)


def run(command: list[str]) -> None:
    """Run a compiler; SubprocessError where it fails or takes too long."""
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)

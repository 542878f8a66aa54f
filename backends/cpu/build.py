"""Compile the loops for this processor, or for each level of x86-64 that a wheel contains.

This file imports only the standard library, because setup.py runs it before anything is installed.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable
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
PATIENCE = 300  # seconds that a compiler may take for a file on an idle processor
LOOK = 5  # seconds between looks at the machine's load


def sources() -> list[Path]:
    """Return the source files."""
    return sorted(KERNELS.glob("*.cpp"))


def compiled(compiler: str, flags: Iterable[str], path: Path) -> None:
    """Write the library to `path`, in one rename; raise SubprocessError or OSError if that fails."""
    from concurrent.futures import ThreadPoolExecutor  # imported only to compile

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects, whole = [f"{scratch}/{source.stem}.o" for source in sources()], Path(scratch) / "whole.so"
        each = [
            [compiler, *FLAGS, *flags, "-c", str(source), "-o", made]
            for source, made in zip(sources(), objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, each))
        run([compiler, "-shared", "-pthread", *objects, "-o", str(whole)])
        whole.replace(path)


def run(command: list[str]) -> None:
    """Run a compiler; raise SubprocessError if it fails or takes too long.

    The time limit grows with the number of running processes for each processor.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        left = float(PATIENCE)
        while process.returncode is None:
            step = min(left, LOOK)
            try:
                out, err = process.communicate(timeout=step)
            except subprocess.TimeoutExpired:
                left -= step / busy()
                if left < 1e-3 * PATIENCE:
                    process.kill()
                    raise subprocess.TimeoutExpired(command, PATIENCE) from None
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, out, err)


def busy() -> float:
    """Return the number of running processes for each processor, at least 1."""
    try:
        return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    except (AttributeError, OSError):  # a system without this count
        return 1.0

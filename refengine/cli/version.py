"""refengine --version: versions, and which backends work here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import subprocess


def version() -> str:
    """Return the text of --version: a line for refengine, then one for each part it runs on."""
    import numpy as np

    from refengine import __version__
    from refengine.backend import automatic

    rows = {
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "numpy": f"{np.__version__}, BLAS {blas()}",
        "compiler": compiler() or "none found: the compiled loops of the cpu backend cannot be made here",
        "backends": "; ".join(("numpy", cpu(), torch(), cuda())),
        "auto": "{}: {}".format(*automatic()),
    }
    return "\n".join([f"refengine {__version__}", *(f"  {name:9} {text}" for name, text in rows.items())])


def blas() -> str:
    """Return the name and version of the BLAS that NumPy calls."""
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return ", ".join(f"{pool['internal_api']} {pool['version'] or ''}".strip() for pool in pools) or "unknown"


def compiler() -> str:
    """Return the first line that the C++ compiler prints of its version; empty where there is none."""
    path = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run([path or "", "--version"], capture_output=True, text=True, timeout=10).stdout
        return said.partition("\n")[0]
    return ""


def cpu() -> str:
    """Return whether the cpu backend can run."""
    from refengine.backends.cpu import native

    return "cpu" if native.load() else "no cpu (NumPy does its work: install a C++ compiler)"


def torch() -> str:
    """Return whether the torch backend can run, by the metadata of the package: importing is slow."""
    try:
        return f"torch ({importlib.metadata.version('torch')})"
    except importlib.metadata.PackageNotFoundError:
        return "no torch (pip install 'refengine[torch]')"


def cuda() -> str:
    """Return whether the cuda backend can run, and on how many devices."""
    try:
        import cupy
    except Exception:  # a broken installation fails in its own ways
        return "no cuda (pip install 'refengine[cuda]')"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception:
        count = 0
    return f"cuda ({count} devices)" if count else "no cuda (no device)"

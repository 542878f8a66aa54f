"""The compiled loops with NEON, on an emulator.

REFENGINE_AARCH64 is the command of a Python for aarch64 with NumPy and ml_dtypes: docs/cpu.md, "Processors".
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.backends.cpu.loops import library

ROOT = Path(__file__).resolve().parents[3]
CROSS, EMULATED = shutil.which("aarch64-linux-gnu-g++"), os.environ.get("REFENGINE_AARCH64", "")


@pytest.mark.thorough
@pytest.mark.skipif(not (CROSS and EMULATED), reason="there is no compiler or no Python for aarch64")
def test_neon(request):
    built = library(Path(request.config.cache.mkdir("cpu_neon")), CROSS, "-O2", "-march=armv8-a")
    for models, threads in ((8, 1), (3, 3)):
        command = [*shlex.split(EMULATED), "-m", "tests.backends.cpu.loops", built, models, threads]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-5000:]

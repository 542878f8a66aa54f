"""The compiled loops access only memory of their arrays, and without races: checked by GCC's sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.cpu.loops import library

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(
    not COMPILER or not sys.platform.startswith("linux"), reason="sanitizers need GCC on Linux"
)
BOTH, THREAD = "address,undefined", "thread"
RUNTIMES = {BOTH: ("libasan.so", "libubsan.so"), THREAD: ("libtsan.so",)}
REPORTS = ("ERROR: AddressSanitizer", "runtime error", "WARNING: ThreadSanitizer")


def run(request, sanitizer: str, *what) -> subprocess.CompletedProcess:
    """Return the finished process of tests/backends/cpu/loops.py; the library is kept for the next run."""
    runtimes = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip(f"there is no runtime of the {sanitizer} sanitizer")
    flags = ("-march=native", "-O1", "-g1", "-fno-sanitize-recover=undefined", f"-fsanitize={sanitizer}")
    folder = Path(request.config.cache.mkdir(f"cpu_{sanitizer.replace(',', '_')}"))
    command = [
        sys.executable,
        "-m",
        "tests.backends.cpu.loops",
        library(folder, COMPILER, *flags),
        *map(str, what),
    ]
    here = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    fixed = ["setarch", "-R"] if sanitizer == THREAD and shutil.which("setarch") else []  # TSan needs it
    return subprocess.run([*fixed, *command], capture_output=True, text=True, env=here, timeout=1800)


def clean(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0 and not any(report in done.stderr for report in REPORTS), done.stderr[-5000:]


@pytest.mark.thorough
def test_random_models_under_the_address_and_undefined_sanitizers(request):
    clean(run(request, BOTH, 200))
    seen = run(request, BOTH, "overflow")
    assert seen.returncode and "heap-buffer-overflow" in seen.stderr, seen.stderr[-2000:]


@pytest.mark.thorough
def test_threads_under_the_thread_sanitizer(request):
    clean(run(request, THREAD, 60, 4))
    seen = run(request, THREAD, "race")
    assert seen.returncode and "data race" in seen.stderr, seen.stderr[-2000:]

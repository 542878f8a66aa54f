"""The NumPy and cpu backends use nothing that exists only on Linux, or only on Unix."""

import os
import subprocess
import sys

import pytest

from tests.support.tries import thorough

LACKING = """
import builtins, mmap, os, signal, sys

sys.modules["resource"] = None
for module, names in {
    os: ("sysconf", "sched_getaffinity", "sched_yield", "fork", "getppid"),
    mmap: ("MADV_DONTNEED", "MADV_HUGEPAGE"),
    signal: ("SIGKILL", "SIGSTOP", "SIGCONT"),
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

real = open

def without_proc(file, *args, **kwargs):
    if str(file).startswith("/proc/") and file != "/proc/self/maps":  # threadpoolctl reads it, on Linux only
        raise FileNotFoundError(2, "No such file or directory", file)
    return real(file, *args, **kwargs)

class Plain(mmap.mmap):
    @property
    def madvise(self):
        raise AttributeError("madvise")

builtins.open, mmap.mmap = without_proc, Plain
"""
USE = """
import sys

import refengine
from refengine import machine
from refengine.cli import main

assert machine.processors() >= 1 and machine.available_memory() == machine.UNKNOWN
assert machine.peak_memory() == 0
machine.forget_peak()
with_options = ["generate", "Once upon a time", "-n", "3", "--seed", "1", "--stats", "--backend", sys.argv[1]]
main(with_options)
"""


def run(script: str, backend: str) -> subprocess.CompletedProcess:
    how = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, "-c", script, backend], **how)


# the loops of the cpu backend are compiled anew there, because the processor is unknown
@pytest.mark.parametrize("name", ["numpy", *thorough("cpu")])
def test_a_system_without_proc_resource_sysconf_or_madvise_writes_the_same_text(name):
    whole = USE[: USE.index("assert")] + USE[USE.index("with_options") :]
    lacking, here = run(LACKING + USE, name), run(whole, name)
    assert (lacking.returncode, here.returncode) == (0, 0), lacking.stderr + here.stderr
    assert lacking.stdout == here.stdout and lacking.stdout.startswith("Once upon a time")

"""Copies of the embedded model generate and chat, on every backend and over ranks, in real processes."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from refengine.quantize import quantize, recipe_of
from tests.support.processes import mpiexec

COPIES = ("nvfp4", "fp8", "ultra")  # of one kind, of another, and a mix of both with bfloat16
BACKENDS = ("numpy", "cpu", "torch") if find_spec("torch") else ("numpy", "cpu")
COMMANDS = {
    "generate": ["generate", "Once upon a time", "-n", "24", "-t", "0", "--dtype", "float32"],
    "chat": ["chat", "Tell me a story", "-n", "24", "-t", "0", "--dtype", "float32", "--no-thinking"],
}
LAYOUTS = {"generate": [(2, "--tp=2"), (4, "--tp=2 --ep=2")], "chat": [(2, "--ep=2"), (4, "--tp=4")]}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    for name in COPIES:
        quantize("tiny", folder / name, recipe_of(name))
    return folder


def alone(*arguments) -> str:
    """Return the output of one process."""
    command = [sys.executable, "-m", "refengine", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def over_ranks(n, *arguments) -> str:
    """Return the output of a job of n processes, all of which have ended."""
    job = mpiexec(n, *arguments)
    assert (job.code, job.left) == (0, ()) and not job.said, job.err
    return job.out


@pytest.mark.slow
def test_two_ranks_write_the_text_of_one_process_from_a_mixed_copy(copies):
    arguments = [*COMMANDS["generate"], "-m", copies / "ultra", "--backend", "numpy"]
    text = alone(*arguments)
    assert len(text) > 40 and over_ranks(2, *arguments, "--tp", 2) == text


@pytest.mark.thorough
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", COPIES)
def test_backends_and_ranks_write_the_text_of_numpy(name, command, copies):
    text = alone(*COMMANDS[command], "-m", copies / name, "--backend", "numpy")
    assert len(text) > 40
    for backend in BACKENDS:
        arguments = [*COMMANDS[command], "-m", copies / name, "--backend", backend]
        assert alone(*arguments) == text
        for n, layout in LAYOUTS[command]:
            assert over_ranks(n, *arguments, *layout.split()) == text

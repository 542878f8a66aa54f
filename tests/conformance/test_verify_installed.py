"""`refengine verify` works from a wheel, in an environment and a directory with nothing else.

It needs a package index for NumPy and the rest, and is skipped without one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo.test_install import ROOT, pip, run, source

pytestmark = pytest.mark.thorough
__all__ = ["source"]
WRONG = """
import numpy as np

def gated_rms_norm(y, z, weight, eps, groups):
    u = y * z / (1 + np.exp(-z))
    return u / np.sqrt((u * u).mean(axis=-1, keepdims=True) + eps) * weight
"""


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> Path:
    """Return the programs' folder of an environment that has only refengine[verify]."""
    work = tmp_path_factory.mktemp("installed")
    pip("wheel", source, "-w", work, env=os.environ | {"REFENGINE_LEVELS": ""})
    (wheel,) = work.glob("*.whl")
    run(sys.executable, "-m", "venv", work / "env")
    programs = work / "env" / ("Scripts" if os.name == "nt" else "bin")
    words = [
        programs / "python",
        "-m",
        "pip",
        "install",
        "-q",
        f"{wheel}[verify]",
        "-c",
        ROOT / "constraints.txt",
    ]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if "No matching distribution" in done.stderr or "Failed to establish a new connection" in done.stderr:
        pytest.skip("there is no package index")
    assert done.returncode == 0, done.stderr
    return programs


def verify(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Return the finished process of the command, run in a folder without environment variables of Python."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(installed / "refengine"), "verify", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_right_candidate_from_a_wheel_in_an_empty_directory(installed, tmp_path, record_property):
    done = verify(installed, tmp_path, "--json")
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["operation"] for row in rows if row["verdict"] != "pass"} == {"step"}
    assert not list(tmp_path.iterdir())
    record_property("seconds of verify from a wheel", sum(row["seconds"] for row in rows))


def test_a_wrong_candidate_from_a_wheel_is_named(installed, tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    done = verify(installed, tmp_path, "--backend", "wrong")
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    assert "\n    as if: the norm is over all of the inner width (trap 2)\n" in done.stdout
    assert "not judged (gated_rms_norm is wrong): mamba2-mixer, " in done.stdout
    case = done.stdout.rstrip().splitlines()[-1].partition("--case ")[2].strip("'")
    again = verify(installed, tmp_path, "--backend", "wrong", "--case", case)
    assert again.returncode == 1 and "gated_rms_norm is wrong" in again.stdout


def test_the_environment_holds_no_pytest_and_no_torch(installed):
    names = ("pytest", "torch", "transformers")
    found = f"from importlib.util import find_spec; print(*filter(find_spec, {names}))"
    assert not run(installed / "python", "-c", found, cwd=installed).strip()

"""Only `refengine` is installed, and a `spec.py` or a `backends/` beside a script does not break it."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
SCRIPT = """
import refengine
engine = refengine.load("tiny")
print(repr("".join(event.text for event in engine.generate("Once upon a time", max_tokens=3, seed=1))))
print(refengine.__file__)
"""


def run(*command, **how) -> str:
    """Return the output of a command; fail with its errors if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, **how) -> str:
    """Run pip without the network; all requirements are installed already."""
    return run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "-q", **how)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a copy of the tracked files, so that a build leaves nothing behind in the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("source")
    names = run("git", "-C", ROOT, "ls-files", "-z").split("\0")
    with tarfile.open(folder / "all.tar", "w") as archive:
        for name in filter(None, names):
            if (ROOT / name).exists():
                archive.add(ROOT / name, name)
    with tarfile.open(folder / "all.tar") as archive:
        archive.extractall(folder / "tree", filter="data")
    return folder / "tree"


@pytest.fixture(
    scope="module",
    params=["tree", *(pytest.param(way, marks=pytest.mark.thorough) for way in ("wheel", "sdist"))],
)
def site(request, source, tmp_path_factory) -> Path:
    """Return a folder in which only this project is installed."""
    work = tmp_path_factory.mktemp(request.param)
    what = source
    levels = "x86-64" if request.param == "wheel" else ""  # compiled loops, which take half a minute a level
    how = {"env": os.environ | {"REFENGINE_LEVELS": levels}}
    if request.param == "wheel":
        pip("wheel", source, "-w", work, **how)
        what = next(work.glob("*.whl"))
    if request.param == "sdist":
        build = "from setuptools import build_meta as b; import sys; b.build_sdist(sys.argv[1])"
        run(sys.executable, "-c", build, work, cwd=source, **how)
        what = next(work.glob("*.tar.gz"))
    pip("install", "--target", work / "site", what, **how)
    if levels and shutil.which("c++"):
        assert (work / "site/refengine/backends/cpu/built/x86-64.so").is_file()
    return work / "site"


def test_only_refengine_is_installed_with_all_its_files(site):
    names = {path.name for path in site.iterdir()} - {"bin", "__pycache__"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"refengine"}
    for folder, endings in {"backends/cpu": (".cpp", ".h"), "backends/cuda": (".cu", ".cuh")}.items():
        there = {path.name for path in (site / "refengine" / folder / "kernels").iterdir()}
        tracked = {path.name for path in (ROOT / folder / "kernels").iterdir() if path.suffix in endings}
        assert tracked and tracked <= there
    files = ("py.typed", "spec/scan.py", "backends/README.md", "models/tiny/model.safetensors")
    assert all((site / "refengine" / name).is_file() for name in files)


@pytest.fixture
def beside(tmp_path) -> Path:
    """Return a folder with a user's script, and with files that could shadow `spec` or `backends`."""
    (tmp_path / "backends").mkdir()
    for name in ("spec.py", "backends/__init__.py"):
        (tmp_path / name).write_text("raise RuntimeError('a file of the user')\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_a_spec_py_beside_a_script_is_left_alone(site, beside):
    how = {"cwd": beside, "env": os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}}
    text, file = run(sys.executable, "script.py", **how).splitlines()
    assert text and Path(file).parent == site / "refengine"
    arguments = ("-m", "refengine", "generate", "Once upon a time", "-n", 3, "--seed", 1)
    alone = run(sys.executable, *arguments, **how)
    assert alone.startswith("Once upon a time")
    pytest.importorskip("torch")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1)
    assert run(sys.executable, *launcher, *arguments, **how) == alone

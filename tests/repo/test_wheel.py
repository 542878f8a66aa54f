"""A wheel computes without a compiler and without PyTorch, at each level of x86-64 that it contains.

The process has only the wheel and its declared dependencies: no site-packages, nothing on PATH.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from refengine.backends.cpu import build, native

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not shutil.which("c++") or platform.machine() not in ("x86_64", "AMD64"),
        reason="wheels with compiled loops are for x86-64, and need a compiler",
    ),
]
LEVELS = [level for level in build.LEVELS if native.has(level)]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return a folder with only the wheel and links to its dependencies."""
    pytest.importorskip("setuptools", minversion="77")
    work = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        copy = work / "tree" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "-q"]
    alone = ["--no-deps", "--no-build-isolation"]
    here = os.environ | {"REFENGINE_LEVELS": " ".join(LEVELS)}
    subprocess.run([*pip, "wheel", work / "tree", "-w", work, *alone], env=here, check=True)
    subprocess.run([*pip, "install", "--target", work / "site", next(work.glob("*.whl")), *alone], check=True)
    for name in dependencies("refengine") - {"refengine"}:
        link(name, work / "site")
    return work / "site"


def dependencies(name: str) -> set[str]:
    """Return the names of a distribution and of its installed requirements, without extras."""
    found, more = set(), [name]
    while more:
        try:
            new = distribution(more.pop())
        except PackageNotFoundError:  # for another system
            continue
        if new.name not in found:
            found.add(new.name)
            needs = [text for text in new.requires or () if "extra ==" not in text]
            more += [re.match(r"[\w.-]+", text)[0] for text in needs]
    return found


def link(name: str, folder: Path) -> None:
    """Link the files and folders of an installed distribution into a folder."""
    for first in {path.parts[0] for path in distribution(name).files or ()} - {"..", "__pycache__"}:
        if not (folder / first).exists():
            (folder / first).symlink_to(distribution(name).locate_file(first))


def run(site: Path, *arguments, level: str = "") -> subprocess.CompletedProcess:
    """Return the finished process of the wheel's command line, with nothing on PATH."""
    here = {"PATH": str(site / "nothing"), "HOME": str(site.parent), "PYTHONPATH": str(site)}
    here |= {native.LEVEL: level} if level else {}
    command = [sys.executable, "-S", "-m", "refengine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=here, cwd=site.parent)


@pytest.mark.parametrize("level", ["", *LEVELS])
def test_a_story_without_a_compiler_and_without_pytorch(site, level):
    done = run(site, "generate", "Once upon a time", "-n", "60", "--seed", "1", "--stats", level=level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > 100
    assert "backend cpu (auto:" in done.stderr and "note:" not in done.stderr
    assert not (site.parent / ".cache").exists()


def test_the_version_names_what_there_is_not(site):
    text = run(site, "--version").stdout
    assert "none found" in text and "no torch" in text and "auto      cpu" in text

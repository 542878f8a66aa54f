"""The commands and consoles that README and docs/ show, and a directory in which bash runs them."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "refengine" / "models" / "tiny"
HISTORY = ("lab-notes.md", "changelog.md")
PAGES = [ROOT / "README.md", ROOT / "backends" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name not in HISTORY]
PROGRAM = (
    r"refengine|python3? -m|pytest|mpiexec|torchrun|pip|apt-get|git clone|node|cc|mkdir|\./consumer|\.ci/run"
)
START = re.compile(rf"""(?:\w+=(?:"[^"]*"|\S+) |eval "\$\()*(?:{PROGRAM})(?= [-.\w"'/]|$)""")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
CONTINUED = re.compile(r"\\\n\s*|(?<=&&)\n\s*")
TABLE = tomllib.loads(Path(__file__).with_name("shown_commands.toml").read_text())


def shown(page: Path) -> list[str]:
    """Return the commands of a page: in blocks of a shell, after a prompt, in indented lines, in the text."""
    text, found = page.read_text(), []
    for language, block in FENCED.findall(text):
        for line in CONTINUED.sub("", block).splitlines():
            if language in ("sh", "bash") or line.startswith("$ "):
                found.append(line.removeprefix("$ "))
    prose = FENCED.sub("", text)
    found += re.findall(r"^    (\S.*)$", prose, re.M)
    found += (" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", prose))
    parts = [part for line in found for part in re.split(r" ?&& ?", re.split(r"   +|  #", line)[0])]
    lines = [part.strip().replace(".venv/bin/", "").removeprefix("time ") for part in parts]
    return [line for line in lines if START.match(line)]


COMMANDS = {line: page for page in PAGES for line in shown(page)}  # a command: one page that shows it


def consoles(page: Path) -> list[tuple[str, str]]:
    """Return (command, output) of each block of a page that begins with a prompt."""
    blocks = (block for _, block in FENCED.findall(page.read_text()) if block.startswith("$ "))
    return [(block.partition("\n")[0][2:], block.partition("\n")[2]) for block in blocks]


def small(line: str, words: str) -> str:
    """Return a shown command as it is run: placeholders replaced, and the words added."""
    names = sorted(TABLE["names"], key=len, reverse=True)
    pattern = "|".join(rf"(?<![\w-]){re.escape(n)}(?!\w)" if n[0].isalpha() else re.escape(n) for n in names)
    return f"{re.sub(pattern, lambda found: TABLE['names'][found[0]], line)} {words}".strip()


def prepare(folder: Path) -> dict[str, str]:
    """Put programs and the modules of the pages into a directory; return the environment to run bash in."""
    programs = folder / "bin"
    programs.mkdir()
    python = shlex.quote(sys.executable)
    for name, run in {"refengine": f"{python} -m refengine", "python": python}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {run} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / "tools").symlink_to(ROOT / "tools")
    scan, _, slip, *_ = python_blocks("write-a-backend.md")
    (folder / "mine.py").write_text(f"{scan}\n{slip.partition('for row in')[0]}\n{BACKEND}")
    (folder / "wrong.py").write_text(python_blocks("verify.md")[0])
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "PYTHONPATH": str(ROOT), "ROOT": str(ROOT), "TINY": str(TINY)}
    return os.environ | env | {"REFENGINE_LIMIT": "3600"}  # seconds for a case of verify, on a busy machine


BACKEND = """
from dataclasses import replace
from refengine.spec.ops import REFERENCE, numpy_backend
BACKEND = numpy_backend(np.float32, ops=replace(REFERENCE, ssd_scan=ssd_scan))
"""


def python_blocks(page: str) -> list[str]:
    """Return the Python blocks of a page of docs/."""
    return [block for name, block in FENCED.findall((ROOT / "docs" / page).read_text()) if name == "python"]


def in_bash(line: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """Return the finished bash of a command line, without input."""
    how = {"cwd": folder, "env": env, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", line], **how)

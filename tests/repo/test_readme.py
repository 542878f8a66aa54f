"""README.md shows the real output of the program (its story: tests/engine/test_cli.py)."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def printed(command):
    """Return the standard output of a command."""
    done = subprocess.run([sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_talk_is_what_chat_prints():
    """(In float64, where no rounding can turn one token into another.)"""
    command, quoted = re.search(r"```sh\n(refengine chat .*)\n```\n\n((?:>.*\n)+)", README).groups()
    assert printed(f"{command} --dtype float64 --backend numpy") == re.sub(r"^> ?", "", quoted, flags=re.M)

"""Commands that the documentation shows exist as shown: subcommands and options, tools, paths of tests."""

import importlib.util
import re
import shlex
from itertools import pairwise
from pathlib import Path

import click
import pytest

from refengine.cli import loaded
from tests.repo.test_docs import PAGES, ROOT

PAGES = [page for page in PAGES if page.name not in ("lab-notes.md", "changelog.md")]  # history
START = re.compile(r"(?:mpiexec -n \d+ |torchrun [^|]*?-m )?(refengine|python -m tools\.|pytest)(?=[ .\w])")
CONTINUED = re.compile(r"(?:&&|\\)\n\s*")


def shown(page: Path) -> list[str]:
    """Return the commands of a page: lines of shell blocks, lines after a prompt, and those in the text."""
    text, found = page.read_text(), []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.S | re.M):
        for line in CONTINUED.sub("", block).splitlines():
            if language in ("sh", "bash") or line.startswith("$ "):
                found += re.split(r"&&", line.removeprefix("$ ").split("  #")[0])
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found += (" ".join(inline.split()) for inline in re.findall(r"`([^`]+)`", prose))
    lines = (line.strip().replace(".venv/bin/", "") for line in found)
    return [line for line in lines if START.match(line)]


COMMANDS = sorted({(str(page.relative_to(ROOT)), line) for page in PAGES for line in shown(page)})


def check(line: str) -> None:
    """Raise an error where a command has no such subcommand, option, module or path."""
    words = shlex.split(line)
    if "refengine" in words:
        words = words[words.index("refengine") + 1 :]
        names = re.fullmatch(r"([a-z]+, )*[a-z]+", " ".join(words))  # a list of commands
        for name in re.findall(r"[a-z]+", names[0]) if names else words[:1]:
            if name[:1] != "-" and name != "COMMAND":
                command = loaded(name)
                if not names and not isinstance(command, click.Group):
                    command.make_parser(click.Context(command)).parse_args(
                        [w for w in words[1:] if w != "--help"]
                    )
    elif "pytest" in words:
        options = {"-k", "-m", "-n", "--hunt"}
        for before, word in pairwise(words):
            if "/" in word and before not in options:
                assert (ROOT / word).exists(), word
    else:
        module = next(word for word in words if word.startswith("tools."))
        assert importlib.util.find_spec(module), module
        path = ROOT / module.replace(".", "/")
        source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        for option in re.findall(r"--[a-z-]+", line):
            assert option in source, option


@pytest.mark.parametrize("page, line", COMMANDS, ids=[f"{page}: {line[:60]}" for page, line in COMMANDS])
def test_a_command_exists_as_it_is_shown(page, line):
    if not re.match(r"refengine[./\[]", line) and "<" not in line:
        check(line)


@pytest.mark.parametrize(
    "line",
    (
        "refengine generates", "refengine generate --temprature 1 x", "refengine inspect, scores",
        "pytest tests/nowhere/test_a.py", "python -m tools.bench.nothing",
        "python -m tools.bench.loop --slot-s 8", "mpiexec -n 4 refengine generate --tq 2 x",
    ),
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(line):
    assert START.match(line)
    with pytest.raises((AssertionError, click.UsageError, AttributeError, ModuleNotFoundError)):
        check(line)

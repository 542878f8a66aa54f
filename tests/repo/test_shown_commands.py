"""Every command that README and docs/ show is run, or is in a table with the reason why not.

tests/support/shown_commands.toml is that table. Commands are run as they are shown, with small sizes; all of
them, also those that are not run, exist: subcommands and options, tools, paths of tests.
"""

import importlib.util
import re
import shlex
import shutil
from itertools import pairwise

import click
import pytest

from refengine.cli import loaded
from tests.support.shown import COMMANDS, PAGES, ROOT, TABLE, consoles, in_bash, prepare, small

NAMED = re.compile(r"refengine|refengine [a-z]+(, [a-z]+)*|refengine vectors write|mpiexec|cc|node")
RUN, TESTED, LEFT = TABLE["run"], TABLE["tested"], TABLE["left"]
ROWS = {line for lines in RUN.values() for line in lines}
CONSOLES = {line: output for page in PAGES for line, output in consoles(page)}
NUMBER = re.compile(r"\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+")  # with a point or an exponent


def left(line: str) -> str | None:
    """Return the row of the table for a command that is not run: itself, or its beginning and " ..."."""
    begins = [row for row in LEFT if row.endswith("...") and line.startswith(row.removesuffix("..."))]
    return line if line in LEFT else begins[0] if begins else None


def test_each_command_is_run_or_has_a_reason():
    """A name alone (`refengine bench`) is a word of a sentence; commands of pytest are the tests."""
    for line, page in COMMANDS.items():
        ways = [line in ROWS or line in CONSOLES, line in TESTED, left(line) is not None]
        ways += [line.startswith("pytest"), not any(ways) and NAMED.fullmatch(line) is not None]
        assert sum(ways) == 1, f"{page.name}: `{line}` needs one row in shown_commands.toml"


def test_no_row_of_the_table_is_left_over():
    assert COMMANDS.keys() >= {*ROWS, *TESTED}
    assert LEFT.keys() == {row for row in map(left, COMMANDS) if row}
    assert RUN.keys() >= set(TABLE["thorough"]) and CONSOLES.keys() >= set(TABLE["thorough_consoles"])
    assert all(any(name in line for line in COMMANDS) for name in TABLE["names"])


@pytest.mark.parametrize("test", sorted(set(TESTED.values())))
def test_the_test_that_runs_a_command_exists(test):
    path, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M)


def check(line: str) -> None:
    """Raise an error where a command has no such subcommand, option, module or path."""
    words = shlex.split(line)
    if "refengine" in words:
        words = words[words.index("refengine") + 1 :]
        names = re.fullmatch(r"([a-z]+, )*[a-z]+", " ".join(words))  # a list of commands
        for name in re.findall(r"[a-z]+", names[0]) if names else words[:1]:
            if name[:1] != "-":
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
    elif "-m" in words and (module := words[words.index("-m") + 1]).partition(".")[0] in ("tools", "tests"):
        assert importlib.util.find_spec(module), module
        path = ROOT / module.replace(".", "/")
        source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
        for option in re.findall(r"--[a-z-]+", line.partition(module)[2]):
            assert option in source, option


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_exists_as_it_is_shown(line):
    if "<" not in line:
        check(small(line, ""))


@pytest.mark.parametrize(
    "line",
    (
        "refengine generates", "refengine generate --temprature 1 x", "refengine inspect, scores",
        "pytest tests/nowhere/test_a.py", "python -m tools.bench.nothing",
        "python -m tools.bench.loop --slot-s 8", "mpiexec -n 4 refengine generate --tq 2 x",
    ),
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(line):
    with pytest.raises((AssertionError, click.UsageError, AttributeError, ModuleNotFoundError)):
        check(line)


def tiers(names, longest: list[str]) -> list:
    """Return names as parameters, the longest of them marked `thorough`, the others `slow`."""
    marks = pytest.mark
    return [pytest.param(name, marks=marks.thorough if name in longest else marks.slow) for name in names]


@pytest.mark.parametrize("group", tiers(RUN, TABLE["thorough"]))
def test_commands_run_as_they_are_shown(group, tmp_path):
    env = prepare(tmp_path)
    for line, words in RUN[group].items():
        for program in ("cc", "node", "mpiexec", "torchrun"):
            if program in line.split() and not shutil.which(program, path=env["PATH"]):
                pytest.skip(f"there is no {program}")
        done = in_bash(small(line, words), tmp_path, env)
        assert done.returncode == 0, f"{small(line, words)}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr and (line not in CONSOLES or same(done.stdout, CONSOLES[line]))


@pytest.mark.parametrize(
    "line", tiers([line for line in CONSOLES if line not in ROWS], TABLE["thorough_consoles"])
)
def test_a_console_shows_what_the_command_prints(line, tmp_path):
    done = in_bash(line, tmp_path, prepare(tmp_path))
    assert done.returncode == ("WRONG" in CONSOLES[line]), done.stderr
    assert all(note.startswith("note: ") for note in done.stderr.splitlines()), done.stderr
    assert same(done.stdout, CONSOLES[line]), done.stdout


def same(printed: str, shown: str) -> bool:
    """Return whether a command printed what a console shows; `...` in it stands for any lines.

    Numbers with a point are measured: they may differ by a factor of four, and small ones (of rounding)
    by more. Seconds, and the case that Hypothesis found, are not compared.
    """
    printed, shown = map(stable, (printed, shown))
    lines = (NUMBER.split(part) for part in shown.split("...\n"))
    number = f"({NUMBER.pattern})"
    found = re.fullmatch("(?:.*\n)*?".join(number.join(map(re.escape, part)) for part in lines), printed)
    pairs = zip(map(float, found.groups()), map(float, NUMBER.findall(shown)), strict=True) if found else ()
    return found is not None and all(max(a, b) < 1e-3 or a / 4 <= b <= 4 * a for a, b in pairs)


def stable(text: str) -> str:
    """Return a text with one space for several, without seconds and without the case that was drawn."""
    text = re.sub(r" +", " ", re.sub(r"\(\d+ s\)", "", text))
    return re.sub(r"(?<=\+ )\d+(?=.* WRONG)|(?<= off by ).*|(?<=\(case=Case\().*", "", text)


@pytest.mark.parametrize(
    "printed, right",
    [
        ("a  1 + 2  4.0\nb\nc\nend (9 s)\n", True), ("a 1 + 2 0.2\nb\nend (3 s)\n", False),
        ("a 1 + 3 3.0\nb\nend (3 s)\n", False), ("a 1 + 2 3.0\nend (3 s)\n", True), ("a 1 + 2 3.0\n", False),
    ],
)  # fmt: skip
def test_a_console_of_another_text_is_seen(printed, right):
    assert same(printed, "a 1 + 2 3.0\n...\nend (5 s)\n") == right
    assert same(printed, "a 1 + 2 3.0\nb\nend (5 s)\n") == (right and printed.count("\n") == 3)

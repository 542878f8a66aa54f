"""Options that several commands share, named as the arguments of the Python API."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from spec.config import InputError


def together(*decorators):
    def decorate(command):
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")

model = click.option("--model", "-m", default="tiny", show_default=True, metavar="PATH",
                     help="A checkpoint directory, or tiny, the model in this package.")  # fmt: skip

engine = together(
    model,
    click.option("--backend", default="numpy", show_default=True, metavar="NAME", help="What computes."),
    click.option("--dtype", default="float32", show_default=True, metavar="TYPE", help="In which numbers."),
    click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where it computes."),
    click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of the matrix products."),
)

sampling = together(
    click.option("--max-tokens", "-n", type=click.IntRange(0), default=256, show_default=True, metavar="N",
                 help="Most new tokens."),
    click.option("--temperature", "-t", type=click.FloatRange(0), metavar="T", help="0: the likeliest."),
    click.option("--top-k", type=click.IntRange(0), metavar="K", help="Only the K likeliest; 0: all."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="P",
                 help="Only the likeliest that reach P together."),
    click.option("--min-p", type=click.FloatRange(0, 1), metavar="P",
                 help="Only those at least P times as likely as the likeliest."),
    click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), metavar="R",
                 help="Above 1: rather not what has been said."),
    click.option("--seed", type=click.IntRange(0, 2**63), metavar="N", help="The same seed, the same text."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text (repeatable)."),
    click.option("--ignore-eos", is_flag=True, help="Go on after end tokens."),
    click.option("--stats", is_flag=True, help="Speed and memory, on stderr."),
)  # fmt: skip


def text_of(path: str) -> str:
    """The text of a file, or of standard input for "-"; InputError when it is not UTF-8."""
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})") from None


def checked_text(text: str, name: str = "the prompt") -> str:
    """A command-line argument that is Unicode; InputError when its bytes were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{name} is not UTF-8 text") from None
    return text

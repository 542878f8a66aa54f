"""The command line: one file a command, and here what they share: how a run ends.

0: done (also when whoever read our output has left), 1: the input is wrong, in one sentence, 2: the
command is wrong, 130: Ctrl-C. A traceback is shown only with --debug.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable

import click

from refengine.ranks.launcher import launched, report_termination

COMMANDS = ("generate", "chat", "inspect", "score", "bench")


class Commands(click.Group):
    """Imports a command's file when it is asked for."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        return getattr(importlib.import_module(f"refengine.cli.{name}"), name) if name in COMMANDS else None


def show_version(ctx, param, value):
    if value:
        from refengine import __version__

        click.echo(f"refengine {__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Print the version.",
)
def cli():
    """Run, look into and measure Nemotron 3 (nemotron_h) models; without --model, the one in this package."""


def main(args: list[str] | None = None) -> None:
    """Run a command, and leave with its exit code."""
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it may have been closed
            stream.reconfigure(encoding="utf-8", errors="replace")
    if "--debug" not in args:
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, about numbers that we then refuse
    if launched().count > 1:
        report_termination()
    if launched().rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (rank 0 prints, for all)
    code, why = run(lambda: command(args), "--debug" in args)
    if launched().count > 1:
        from refengine.ranks.comm.connect import leave

        leave(code, why)
    sys.exit(code)


def command(args: list[str]) -> None:
    """Do what a command line asks for."""
    with cli.make_context("refengine", list(args)) as context:
        cli.invoke(context)
    if sys.stdout is not None:
        sys.stdout.flush()


def run(work: Callable[[], None], debug: bool) -> tuple[int, str]:
    """The exit code, and for other ranks a sentence why it is not 0."""
    try:
        work()
        return 0, ""
    except click.exceptions.Exit as done:
        return done.exit_code, ""
    except click.ClickException as error:
        if launched().local_rank == 0:  # the ranks of a machine have one command line
            error.show()
        return error.exit_code, error.format_message()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush is quiet too
        return 0, ""
    except KeyboardInterrupt:
        return 130, "interrupted"
    except Exception as error:
        if debug:
            traceback.print_exc()
        here = launched()
        name = f"refengine, rank {here.rank}" if here.count > 1 else "refengine"
        click.echo(f"{name}: {sentence(error)}", err=True)
        return 1, sentence(error)


def sentence(error: Exception) -> str:
    """What went wrong, on one line."""
    from refengine.spec.config import InputError

    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    return f"an error inside the program ({type(error).__name__}: {text}); --debug shows where"

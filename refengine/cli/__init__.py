"""The command line: a file for each command, and here how a run ends.

Exit codes: 0 done (also when stdout was closed), 1 the input is wrong, in one sentence, 2 the command is
wrong, 130 Ctrl-C. A traceback is shown only with --debug.
"""

from __future__ import annotations

import functools
import gc
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable

import click

from refengine.cli import hints
from refengine.ranks.launcher import launched, report_termination

COMMANDS: tuple[str, ...] = ("generate", "chat", "inspect", "score", "tokenize", "quantize", "convert")
COMMANDS += ("bench", "verify", "vectors", "trace", "diff", "state", "completion")


class Commands(click.Group):
    """The commands; the file of one is imported when it is asked for."""

    def list_commands(self, ctx):
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx, name):
        """Return a command, each of its options with an environment variable; None for an unknown name."""
        if name not in COMMANDS:
            return None
        return loaded(name)

    def resolve_command(self, ctx, args):
        """Return (name, command, arguments); a usage error names our command for one of another engine."""
        if args and args[0] not in COMMANDS and args[0] in hints.COMMANDS:
            raise click.UsageError(f"No such command {args[0]!r}. Here it is {hints.COMMANDS[args[0]]}.", ctx)
        name, found, rest = super().resolve_command(ctx, args)
        if found is not None:
            hints.refuse_clusters(rest, found)
        return name, found, rest


@functools.cache
def loaded(name: str) -> click.Command:
    """Return a command from its file, each of its options with an environment variable that errors name."""
    command = with_variables(getattr(importlib.import_module(f"refengine.cli.{name}"), name))
    if command.callback is not None:
        command.callback = hints.naming_variables(command.callback)
    return command


def with_variables(command: click.Command) -> click.Command:
    """Return the command; REFENGINE_MAX_TOKENS is the variable of --max-tokens, and so on."""
    for param in command.params:
        if isinstance(param, click.Option) and param.envvar is None and not param.is_eager:
            longest = max(param.opts, key=len).lstrip("-")
            param.envvar = "REFENGINE_" + longest.upper().replace("-", "_")
    return command


def show_version(ctx, param, value):
    """Print the version, and that of what refengine runs on."""
    if value and not ctx.resilient_parsing:
        from refengine.cli.version import version

        click.echo(version())
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every option has an environment variable, the same for all commands: REFENGINE_MODEL for "
    "--model, REFENGINE_MAX_TOKENS for --max-tokens.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Print versions, and which backends work here.",
)
def cli():
    """Run, inspect and measure Nemotron 3 (nemotron_h) models. Without --model: the one in this package."""


OFF = ("", "0", "false", "no", "off")  # values of a variable that leave a flag off


def main(args: list[str] | None = None) -> None:
    """Run a command, and leave with its exit code."""
    if args is None:  # a process of its own: its imports make many objects, and next to no garbage
        args = sys.argv[1:]
        gc.set_threshold(50_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may have been closed
            stream.reconfigure(encoding="utf-8", errors="replace")
    debug = "--debug" in args or os.environ.get("REFENGINE_DEBUG", "").lower() not in OFF
    if not debug:
        warnings.simplefilter("ignore", RuntimeWarning)  # of NumPy, about numbers that we then refuse
    try:
        here = launched()
    except ValueError as error:  # an InputError, of a launcher's variable
        click.echo(f"refengine: {error}", err=True)
        sys.exit(1)
    if here.count > 1:
        report_termination()
    if here.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (rank 0 prints, for all)
    code, why = run(lambda: command(args), debug)
    if here.count > 1:
        from refengine.ranks.comm.connect import leave

        leave(code, why)
    sys.exit(code)


def command(args: list[str]) -> None:
    """Run a command line; raises what goes wrong."""
    complete(args)
    with cli.make_context("refengine", list(args)) as context:
        cli.invoke(context)
    if sys.stdout is not None:
        sys.stdout.flush()


def complete(args: list[str]) -> None:
    """Answer a shell that asks for completions, and exit; return at once where none does."""
    if ask := os.environ.get("_REFENGINE_COMPLETE"):
        from click.shell_completion import shell_complete

        raise click.exceptions.Exit(shell_complete(cli, {}, "refengine", "_REFENGINE_COMPLETE", ask))


def run(work: Callable[[], None], debug: bool) -> tuple[int, str]:
    """Return the exit code, and for other ranks a sentence why it is not 0."""
    try:
        work()
        return 0, ""
    except click.exceptions.Exit as done:
        return done.exit_code, ""
    except click.ClickException as error:
        error = hints.with_hint(error)
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
    """Return what went wrong, on one line."""
    from refengine.spec.config import InputError

    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    return f"an error inside the program ({type(error).__name__}: {text}); --debug shows where"

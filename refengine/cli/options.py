"""Options that several commands share, named as the arguments of the Python API."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import click

from refengine.backend import MOST_THREADS, NAMES
from refengine.ranks.comm import TIMEOUT
from refengine.ranks.launcher import launched
from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import InputError


def together(*decorators):
    def decorate(command):
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class Finite(click.FloatRange):
    """A number in a range, which infinity and NaN are not."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def some_text(ctx, param, values):
    try:
        if not all(checked_text(value) for value in values):
            raise click.BadParameter("a stop string is empty.")
    except InputError as error:
        raise click.BadParameter(f"{error}.") from None
    return values


debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")

model = click.option(
    "--model",
    "-m",
    default="tiny",
    show_default=True,
    metavar="PATH",
    help="A checkpoint directory, or tiny, the model in this package.",
)

engine = together(
    model,
    click.option(
        "--backend", type=click.Choice(NAMES), default="numpy", show_default=True, help="What computes."
    ),
    click.option(
        "--dtype",
        type=click.Choice(tuple(ITEMSIZE)),
        default="float32",
        show_default=True,
        help="In which numbers.",
    ),
    click.option(
        "--device",
        metavar="NAME",
        help="Where: cpu, cuda, cuda:N, auto.  [default: cpu; of the cuda backend, cuda]",
    ),
    click.option(
        "--threads", type=click.IntRange(1, MOST_THREADS), metavar="N", help="Threads of the matrix products."
    ),
    click.option(
        "--deterministic",
        is_flag=True,
        help="The same bits on every run, also where a device is faster without.",
    ),
)

ranks = together(
    click.option(
        "--tp",
        type=click.IntRange(1),
        default=1,
        metavar="N",
        help="Ranks that share each layer, under mpiexec or torchrun.",
    ),
    click.option(
        "--ep", type=click.IntRange(1), default=1, metavar="N", help="Times as many, that share the experts."
    ),
    click.option("--pp", type=click.IntRange(1), default=1, metavar="N", help="Times as many: stages."),
    click.option(
        "--timeout",
        "--patience",
        "timeout",
        type=Finite(0, 1e6, min_open=True),
        default=TIMEOUT,
        show_default=True,
        metavar="SECONDS",
        envvar=("REFENGINE_TIMEOUT", "REFENGINE_PATIENCE"),
        help="Seconds without a heartbeat after which a rank counts as lost.",
    ),
)


def load(tp: int, ep: int, pp: int, timeout: float, **how):
    """The engine, of this process alone or of one rank of several."""
    if tp * ep * pp == launched().count == 1:
        import refengine

        return refengine.load(**how)
    from refengine.ranks.load import load as load_rank

    return load_rank(**how, tp=tp, ep=ep, pp=pp, timeout=timeout)


def parted(others: dict) -> tuple[dict, dict]:
    """Options of `load`, and the others."""
    names = ("model", "backend", "dtype", "device", "threads", "deterministic", "tp", "ep", "pp", "timeout")
    return {name: others[name] for name in names}, {k: v for k, v in others.items() if k not in names}


def say_ranks(engine) -> None:
    """What each rank has of the checkpoint, on stderr; nothing where there is one."""
    if not hasattr(engine, "shard"):
        return
    from refengine.ranks.load import bytes_read
    from refengine.spec.shard import Shard
    from refengine.units import bytes_text

    for rank in range(engine.shard.layout.ranks):
        read = bytes_read(engine.checkpoint.config, Shard(engine.shard.layout, rank))
        kept, touched = (bytes_text(sum(read[what].values())) for what in ("kept", "touched"))
        roles = ", ".join(f"{role} {bytes_text(size)}" for role, size in read["kept"].items())
        click.echo(f"rank {rank}: keeps {kept} of the checkpoint, reads {touched} for it; {roles}", err=True)


def follows() -> bool:
    """Whether this is a rank that another tells what to do."""
    return launched().rank > 0


sampling = together(
    click.option(
        "--max-tokens",
        "-n",
        type=click.IntRange(0),
        default=256,
        show_default=True,
        metavar="N",
        help="At most this many new tokens.",
    ),
    click.option(
        "--temperature",
        "-t",
        type=Finite(0),
        metavar="T",
        help="0: the likeliest. [default of this and the next: what the checkpoint recommends]",
    ),
    click.option("--top-k", type=click.IntRange(0), metavar="K", help="Only the K likeliest; 0: all."),
    click.option(
        "--top-p",
        type=Finite(0, 1, min_open=True),
        metavar="P",
        help="Only the likeliest that reach P together.",
    ),
    click.option(
        "--min-p",
        type=Finite(0, 1),
        metavar="P",
        help="Only those at least P times as likely as the likeliest.",
    ),
    click.option(
        "--repetition-penalty",
        type=Finite(0, min_open=True),
        metavar="R",
        help="Above 1: discourage repetition.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63),
        metavar="N",
        help="The same seed, the same text; prompt i has N + i.",
    ),
    click.option(
        "--stop", multiple=True, metavar="TEXT", callback=some_text, help="End before this text (repeatable)."
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on after end tokens."),
    click.option("--stats", is_flag=True, help="Speed and memory, on stderr."),
)


def named(path: str) -> str:
    """What a sentence calls a file."""
    return "standard input" if path == "-" else path


def text_of(path: str) -> str:
    """The text of a file, or of standard input for "-"; InputError when it is not UTF-8."""
    name = named(path)
    if not path:
        raise InputError("the name of the file is empty")
    try:
        data = standard_input().read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    return decoded(data, name)


def standard_input():
    if sys.stdin is None:
        raise InputError("standard input is closed")
    return sys.stdin.buffer


def decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})") from None


def checked_text(text: str, name: str = "the prompt") -> str:
    """A command-line argument as the text that its bytes spell, whatever the locale made of them."""
    return decoded(os.fsencode(text), name)


def say(text: str, **how) -> None:
    """Print, now, without a line end."""
    click.echo(text, nl=False, **how)
    if sys.stdout is not None:
        sys.stdout.flush()

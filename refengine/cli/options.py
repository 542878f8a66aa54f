"""Options that several commands share; their names are those of the arguments of the Python API."""

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
    """Return one decorator that applies several, the first outermost."""

    def decorate(command):
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class Finite(click.FloatRange):
    """A number in a range, infinity and NaN excluded."""

    def convert(self, value, param, ctx):
        """Return the number; a usage error if it is not finite or not in the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def some_text(ctx, param, values):
    """Return the values; a usage error if one is empty or not UTF-8."""
    try:
        if not all(checked_text(value) for value in values):
            raise click.BadParameter("a stop string is empty.")
    except InputError as error:
        raise click.BadParameter(f"{error}.") from None
    return values


debug = click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of an error.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")

model = click.option(
    "--model",
    "-m",
    default="tiny",
    show_default=True,
    metavar="PATH",
    help="Checkpoint directory; 'tiny' is the model in this package.",
)

engine = together(
    model,
    click.option(
        "--backend",
        type=click.Choice(NAMES),
        default="numpy",
        show_default=True,
        help="Library that computes.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(tuple(ITEMSIZE)),
        default="float32",
        show_default=True,
        help="Dtype of the weights and the computation.",
    ),
    click.option(
        "--device",
        metavar="NAME",
        help="Device: cpu, cuda, cuda:N or auto.  [default: cpu; cuda for the cuda backend]",
    ),
    click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        metavar="N",
        help="Number of threads of the computation.",
    ),
    click.option(
        "--deterministic", is_flag=True, help="Compute the same bits in every run, even where that is slower."
    ),
)

ranks = together(
    click.option(
        "--tp",
        type=click.IntRange(1),
        default=1,
        metavar="N",
        help="Tensor-parallel size: N ranks split each layer (under mpiexec or torchrun).",
    ),
    click.option(
        "--ep",
        type=click.IntRange(1),
        default=1,
        metavar="N",
        help="Expert-parallel size: N ranks split the routed experts.",
    ),
    click.option(
        "--pp",
        type=click.IntRange(1),
        default=1,
        metavar="N",
        help="Pipeline-parallel size: N ranks split the list of layers.",
    ),
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
    """Return the engine of this process, or of this rank where several were started."""
    if tp * ep * pp == launched().count == 1:
        import refengine

        return refengine.load(**how)
    from refengine.ranks.load import load as load_rank

    return load_rank(**how, tp=tp, ep=ep, pp=pp, timeout=timeout)


def parted(others: dict) -> tuple[dict, dict]:
    """Split options into those of `load` and the others; return both."""
    names = ("model", "backend", "dtype", "device", "threads", "deterministic", "tp", "ep", "pp", "timeout")
    return {name: others[name] for name in names}, {k: v for k, v in others.items() if k not in names}


def say_ranks(engine) -> None:
    """Print for each rank how much of the checkpoint it keeps, on stderr; prints nothing for one process."""
    shard = getattr(engine.runner, "shard", None)
    if shard is None:
        return
    from refengine.ranks.load import bytes_read
    from refengine.spec.shard import Shard
    from refengine.units import bytes_text

    for rank in range(shard.layout.ranks):
        read = bytes_read(engine.checkpoint.config, Shard(shard.layout, rank))
        kept, touched = (bytes_text(sum(read[what].values())) for what in ("kept", "touched"))
        roles = ", ".join(f"{role} {bytes_text(size)}" for role, size in read["kept"].items())
        click.echo(f"rank {rank}: keeps {kept} of the checkpoint, reads {touched} for it; {roles}", err=True)


def follows() -> bool:
    """Return whether this is a rank other than 0, which follows the requests of rank 0."""
    return launched().rank > 0


sampling = together(
    click.option(
        "--max-tokens",
        "-n",
        type=click.IntRange(0),
        default=256,
        show_default=True,
        metavar="N",
        help="Maximum number of new tokens.",
    ),
    click.option(
        "--temperature",
        "-t",
        type=Finite(0),
        metavar="T",
        help="Sampling temperature; 0 takes the likeliest token.  "
        "[default of this and the next four: the checkpoint's]",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        metavar="K",
        help="Sample from the K likeliest tokens; 0: from all.",
    ),
    click.option(
        "--top-p",
        type=Finite(0, 1, min_open=True),
        metavar="P",
        help="Sample from the likeliest tokens that add up to P.",
    ),
    click.option(
        "--min-p",
        type=Finite(0, 1),
        metavar="P",
        help="Sample from tokens at least P times as likely as the likeliest.",
    ),
    click.option(
        "--repetition-penalty",
        type=Finite(0, min_open=True),
        metavar="R",
        help="Values above 1 make repetition less likely.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63),
        metavar="N",
        help="Seed of the random numbers; prompt i uses N + i.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        callback=some_text,
        help="Stop before this text (repeatable).",
    ),
    click.option("--ignore-eos", is_flag=True, help="Continue after an end token."),
    click.option("--stats", is_flag=True, help="Print speed and memory on stderr."),
)


def named(path: str) -> str:
    """Return the name of a file for a message; "-" is standard input."""
    return "standard input" if path == "-" else path


def text_of(path: str) -> str:
    """Return the text of a file, or of standard input for "-"; InputError when it is not UTF-8."""
    name = named(path)
    if not path:
        raise InputError("the name of the file is empty")
    try:
        data = standard_input().read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    return decoded(data, name)


def standard_input():
    """Return the binary stream of standard input; InputError when it is closed."""
    if sys.stdin is None:
        raise InputError("standard input is closed")
    return sys.stdin.buffer


def decoded(data: bytes, name: str) -> str:
    """Return UTF-8 bytes as text; InputError, with the name of their source, when they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})") from None


def checked_text(text: str, name: str = "the prompt") -> str:
    """Return a command-line argument decoded as UTF-8, whatever the locale; InputError if it is not UTF-8."""
    return decoded(os.fsencode(text), name)


def say(text: str, **how) -> None:
    """Print text without a line end, and flush."""
    click.echo(text, nl=False, **how)
    if sys.stdout is not None:
        sys.stdout.flush()

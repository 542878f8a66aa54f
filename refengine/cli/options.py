"""Options that several commands share; their names are those of the arguments of the Python API."""

from __future__ import annotations

import functools
import math
import os
import re
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from refengine.backend import MOST_THREADS, NAMES, automatic
from refengine.machine import processors
from refengine.ranks.comm import TIMEOUT
from refengine.ranks.launcher import launched
from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import InputError
from refengine.spec.numerics import KV_DTYPES, SSM_DTYPES
from refengine.speculation import MOST_DRAFTS, MTP_NORMS


def together(*decorators):
    """Return one decorator that applies several, the first outermost."""

    def decorate(command):
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class Finite(click.FloatRange):
    """Reads a number in a range, infinity and NaN excluded."""

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


class FileName(click.types.StringParamType):
    """Takes the name of a file, which a shell completes."""

    def shell_complete(self, ctx, param, incomplete):
        """Return the item that lets the shell complete names of files."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class ModelName(click.types.StringParamType):
    """Takes a directory, a GGUF file or the name of a model; a shell completes each."""

    def shell_complete(self, ctx, param, incomplete):
        """Return the known names that begin so, and the item that lets the shell complete files."""
        from click.shell_completion import CompletionItem

        from refengine.checkpoint.hub import models
        from refengine.checkpoint.locate import embedded

        names = [CompletionItem(name) for name in [*embedded(), *models()] if name.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file"), *names]


class Bytes(click.ParamType):
    """Reads a number of bytes, with a unit if one is given."""

    name = "BYTES"

    def convert(self, value, param, ctx):
        """Return the number; a usage error for anything else."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?(?:([KMGT])(i?)B?|B)?", value, re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is not a number of bytes, such as 0, 500MB or 2GiB.", param, ctx)
        number, unit, binary = found.groups()
        base = 1024 if binary else 1000
        return int(float(number) * base ** " KMGT".index((unit or " ").upper()))


class Drafts(click.ParamType):
    """Reads a number of drafts, or auto."""

    name = "K|auto"

    def convert(self, value, param, ctx):
        """Return the number or "auto"; a usage error for anything else."""
        if value == "auto":
            return value
        try:
            return click.IntRange(1, MOST_DRAFTS).convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither auto nor a number from 1 to {MOST_DRAFTS}.", param, ctx)


class StopText(click.types.StringParamType):
    """Takes a stop string; a variable holds one a line."""

    envvar_list_splitter = "\n"


def one_of(names: str, **sources) -> list:
    """Return the values of sources of which one may be given; what is typed goes before variables."""
    context = click.get_current_context()
    typed = [
        name
        for name, value in sources.items()
        if value is not None and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if typed:
        sources = {name: value if name in typed else None for name, value in sources.items()}
    if sum(value is not None for value in sources.values()) > 1:
        raise click.UsageError(f"give only one of {names}.")
    return list(sources.values())


def kept(ctx, param, value) -> None:
    """Keep a flag for `flag`, which the command itself need not know."""
    ctx.meta[f"refengine.{param.name}"] = value


def flag(name: str) -> bool:
    """Return whether the running command was given --quiet or --verbose."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(f"refengine.{name}"))


def note(text: str) -> None:
    """Print a note on stderr, on rank 0; nothing with --quiet."""
    if not flag("quiet") and not follows():
        click.echo(f"note: {text}", err=True)


DTYPES = {"f32": "float32", "f64": "float64", "bf16": "bfloat16", "f16": "float16", "half": "float16"}


class Dtype(click.Choice):
    """Reads a dtype by one of its names, or auto."""

    def __init__(self):
        super().__init__(("auto", *ITEMSIZE, *DTYPES), case_sensitive=False)

    def get_metavar(self, param, ctx=None):
        """Return the names to show in help."""
        return "auto|bf16|f16|f32|f64"

    def convert(self, value, param, ctx):
        """Return the full name of the dtype, or "auto"."""
        name = super().convert(value, param, ctx)
        return DTYPES.get(name, name)


def dtype_of(model: str, backend: str) -> str:
    """Return the dtype that --dtype auto means: that of Checkpoint.auto_dtype; `load` uses the file."""
    from refengine.checkpoint import Checkpoint

    opened = Checkpoint.open(model)
    if context := click.get_current_context(silent=True):
        context.meta["refengine.opened"] = model, opened
    return opened.auto_dtype(backend)


def with_dtype(command):
    """Return the command with the backend and the dtype that auto means."""

    @functools.wraps(command)
    def call(*args, **how):
        if how["backend"] == "auto":
            how["backend"], reason = automatic(
                how["device"], how["dtype"], launched().count, how["batch_invariant"], how["packed_inputs"]
            )
            click.get_current_context().meta["refengine.reason"] = reason
        if how["dtype"] == "auto":
            how["dtype"] = dtype_of(how["model"], how["backend"])
        return command(*args, **how)

    return call


RANGE = re.compile(r"\s+\[[\d.<=>]*x[\d.<=>]*\]|; [\d.<=>]*x[\d.<=>]*(?=\])")
TOGETHER = {  # options that share a line of help
    "tp": ("--tp N, --ep N, --pp N", "Tensor, expert, pipeline parallelism (ranks)."),
    "kv_dtype": ("--kv-dtype, --ssm-dtype NAME", "Dtypes of the KV cache and of Mamba states."),
    "quiet": ("-q, --quiet; -v, --verbose", "Print no notes; print what is loaded."),
    "cache": ("--cache BYTES, --cache-dir D", "Keep states of prefixes: 2GiB; directory D."),
    "save_state": ("--save-state, --load-state F", "Save the state at the end; resume from one."),
    "show_thinking": ("--show-thinking", "Print thoughts; a terminal shows them anyway."),
    "timeout": ("--timeout SECONDS", "Longest wait for a rank's heartbeat.  [20]"),
}
SHARED = {"ep", "pp", "ssm_dtype", "verbose", "load_state", "cache_dir"}


class Command(click.Command):
    """Runs a command whose help fits a screen: ranges are left to errors, and some options share a line."""

    def format_options(self, ctx, formatter):
        """Write the options; most take one line."""
        found = [
            (param.name, param.get_help_record(ctx))
            for param in self.get_params(ctx)
            if isinstance(param, click.Option)
        ]
        names = {name for name, record in found if record is not None}
        shared = TOGETHER if names >= {"verbose"} else {}  # a command without ranks shares no line
        rows = [
            shared.get(name or "", (record[0], RANGE.sub("", record[1])))
            for name, record in found
            if record is not None and not (shared and name in SHARED)
        ]
        with formatter.section("Options"):
            formatter.write_dl(rows)


debug = click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of an error.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")

model = click.option(
    "--model",
    "-m",
    type=ModelName(),
    default="tiny",
    show_default=True,
    metavar="MODEL",
    help="Directory, GGUF file, or name in the HF cache.",
)

quiet = click.option("--quiet", "-q", is_flag=True, expose_value=False, callback=kept, help="Print no notes.")

loudness = together(
    quiet,
    click.option(
        "--verbose",
        "-v",
        is_flag=True,
        expose_value=False,
        callback=kept,
        help="Print on stderr what is loaded and how.",
    ),
)

storage = together(
    click.option(
        "--kv-dtype",
        type=click.Choice(list(KV_DTYPES)),
        metavar="NAME",
        help="Store keys and values in float32, bfloat16 or fp8.  [default: the checkpoint's]",
    ),
    click.option(
        "--ssm-dtype",
        type=click.Choice(SSM_DTYPES),
        metavar="NAME",
        help="Store Mamba states in float32, or in float16 with stochastic rounding.",
    ),
)

engine = together(
    model,
    click.option(
        "--backend",
        type=click.Choice(NAMES),
        default="auto",
        show_default=True,
        metavar="NAME",
        help="auto, cpu, numpy, torch or cuda.",
    ),
    click.option(
        "--dtype", type=Dtype(), default="auto", show_default=True, help="auto: as stored; numpy: float32."
    ),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or auto."),
    click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        metavar="N",
        help="Number of threads.  [default: all processors it may use]",
    ),
    storage,
    click.option("--deterministic", is_flag=True, help="Compute the same bits in every run."),
    click.option("--batch-invariant", is_flag=True, help="The same bits in any batch (cpu backend)."),
    click.option("--packed-inputs", is_flag=True, help="Pack inputs, as W4A4 does (numpy backend)."),
    click.option(
        "--mtp-norm", type=click.Choice(MTP_NORMS), default="rms", hidden=True, help="Final norm of the head."
    ),
    loudness,
    with_dtype,
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
        help="Longest wait for a rank's heartbeat; a rank without one is considered dead.",
    ),
)


def load(tp: int, ep: int, pp: int, timeout: float, **how):
    """Return the engine of this process, or of this rank where several were started.

    The notes of the checkpoint are printed on stderr, unless --quiet is given.
    """
    if how.get("cache_dir") is not None and not how.get("cache"):
        raise click.UsageError("--cache-dir needs a number of bytes to keep: give --cache 2GiB too.")
    if (threads := how.get("threads") or 0) > processors():
        note(f"--threads {threads}: this process may use {processors()} processors, so more is no faster")
    if tp * ep * pp == launched().count == 1:
        import refengine

        name, opened = click.get_current_context().meta.pop("refengine.opened", (None, None))
        engine = refengine.load(**how | ({"model": opened} if name == how["model"] else {}))
    else:
        from refengine.ranks.load import load as load_rank

        engine = load_rank(**how, tp=tp, ep=ep, pp=pp, timeout=timeout)
    for text in engine.checkpoint.notes:
        note(text)
    if flag("verbose") and not follows():
        from refengine.units import bytes_text

        size = bytes_text(sum(tensor.nbytes for tensor in engine.checkpoint.stored.values()))
        click.echo(f"{engine.checkpoint.directory}: {size} of weights", err=True)
        chosen = ", ".join(f"{name} {value}" for name, value in how.items() if value and name != "model")
        click.echo(f"{chosen}; loaded in {engine.load_seconds:.2f} s", err=True)
    return engine


LOADING: tuple[str, ...] = ("model", "backend", "dtype", "device", "threads", "deterministic")
LOADING += ("tp", "ep", "pp", "timeout", "batch", "batch_invariant", "kv_dtype", "ssm_dtype")
LOADING += ("cache", "cache_dir", "packed_inputs", "mtp_norm")

cache_dir = click.option(
    "--cache-dir", type=FileName(), metavar="D", help="Keep states of prefixes in directory D too."
)
cache = together(
    click.option(
        "--cache",
        type=Bytes(),
        default=0,
        metavar="BYTES",
        help="Prefix cache: keep states, up to BYTES (2GiB).",
    ),
    cache_dir,
)
batch = click.option(
    "--batch", type=click.IntRange(1), metavar="N", help="Largest number of sequences in a batch."
)


def parted(others: dict) -> tuple[dict, dict]:
    """Return (the options of `load`, the others)."""
    loading = {name: others[name] for name in LOADING if others.get(name) is not None}
    return loading, {k: v for k, v in others.items() if k not in LOADING}


def backend_text(engine) -> str:
    """Return the backend of an engine for --stats, and the reason for it where auto chose it."""
    reason = click.get_current_context().meta.get("refengine.reason")
    return f"backend {engine.model.backend.name}" + (f" (auto: {reason})" if reason else "")


def say_ranks(engine) -> None:
    """Print for each rank how much of the checkpoint it keeps, on stderr; prints nothing for one process."""
    shard = getattr(getattr(engine, "runner", engine), "shard", None)
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


def say_trouble(engine) -> None:
    """Print a note where a directory of prefixes could not be written to."""
    if engine.disk is not None and engine.disk.trouble:
        note(f"{engine.disk.trouble}; nothing more is kept there")


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
        help="0: the likeliest.  [default: the checkpoint's]",
    ),
    click.option(
        "--top-k", type=click.IntRange(0), metavar="K", help="Sample from the K likeliest tokens; 0: all."
    ),
    click.option(
        "--top-p",
        type=Finite(0, 1, min_open=True),
        metavar="P",
        help="Sample from the likeliest that sum to P.",
    ),
    click.option("--min-p", type=Finite(0, 1), metavar="P", help="Sample where p >= P times the highest p."),
    click.option(
        "--repetition-penalty",
        type=Finite(0, min_open=True),
        metavar="R",
        help="Above 1: repetition is less likely.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63),
        metavar="N",
        help="Seed of the random numbers; prompt i: N + i.",
    ),
    click.option(
        "--stop",
        type=StopText(),
        multiple=True,
        metavar="TEXT",
        callback=some_text,
        help="Stop before this text (repeatable).",
    ),
    click.option("--ignore-eos", is_flag=True, help="Continue after an end token."),
    click.option(
        "--speculate", type=Drafts(), metavar="K|auto", help="Speculative decoding with K MTP drafts."
    ),
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
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {getattr(error, 'strerror', error)}") from None
    return decoded(data, name).removeprefix("\ufeff")  # a byte-order mark is no text


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

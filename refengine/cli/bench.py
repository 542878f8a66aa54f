"""refengine bench: measure how fast a model runs on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.packed import KINDS
from refengine.cli import options
from refengine.ranks.launcher import launched
from refengine.spec.arrays import DTYPES
from refengine.spec.config import InputError
from refengine.storage import bytes_on, storage
from refengine.units import bytes_text


class Numbers(click.ParamType):
    """A list of whole numbers with commas between them."""

    name = "N,N"

    def convert(self, value, param, ctx):
        """Return the list of numbers; a usage error where the text is none."""
        try:
            numbers = [int(part) for part in value.split(",")] if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, such as 1,8", param, ctx)
        if not all(n >= 1 for n in numbers):
            self.fail("every number must be at least 1", param, ctx)
        return numbers


@click.command(cls=options.Command, short_help="Measure how fast a model runs here.")
@options.engine
@click.option(
    "--prompt-tokens", "prompts", type=Numbers(), default="512", show_default=True, help="Lengths of prompts."
)
@click.option(
    "--batch", "batches", type=Numbers(), default="1,8", show_default=True, help="Sequences in a batch."
)
@click.option(
    "--context",
    "contexts",
    type=Numbers(),
    default="64",
    show_default=True,
    help="Tokens in the cache before decoding.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    metavar="N",
    help="Prefills; the median is printed.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    metavar="N",
    help="Decoded tokens; the median is printed.",
)
@options.as_json
@options.ranks
@options.debug
def bench(prompts, batches, contexts, repeat, steps, as_json, **how):
    """Measure tokens per second, and their share of what the machine can do.

    That is the measured peak of matrix products for prefill, and the memory bandwidth for decoding.
    """
    if options.follows():
        options.load(**how).follow()
        return
    asked = {"prompts": prompts, "batches": batches, "contexts": contexts, "repeat": repeat, "steps": steps}
    several = [how[name] for name in ("tp", "ep", "pp")] != [1, 1, 1] or launched().count > 1
    rows = measured(asked, how, several)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    click.echo(f"{how['backend']}, {how['dtype']}, {title(next(rows))}\n")
    memory = f"peak memory{' of a rank' * several}"
    click.echo(f"| | batch | tokens before | tokens/s | ms a step | share of the machine | {memory} |")
    click.echo("|---|---|---|---|---|---|---|")
    for row in rows:
        before = f"{row['tokens']}" if row["what"] == "decode" else f"prompt of {row['tokens']}"
        step = f"{row['milliseconds']:.1f}" if "milliseconds" in row else ""
        share = f"{row['share']:.0%}" if row["share"] else ""
        click.echo(
            f"| {row['what']} | {row['batch']} | {before} | {row['tokens_per_second']:.1f} | {step} | "
            f"{share} | {bytes_text(row['peak_memory'])} |"
        )


def measured(asked: dict, how: dict, several: bool) -> Iterator[dict]:
    """Return the row of the machine, then those asked for; over ranks the machine is not measured."""
    from refengine import machine
    from refengine.bench import bench as rows_of

    checkpoint = checked(how["model"], asked)
    cfg = checkpoint.config
    on_host = not several and how["backend"] != "cuda" and how["device"] in (None, "cpu")
    threads = how["threads"] or machine.processors()
    if on_host:
        kept = storage(checkpoint, how["kv_dtype"], how["ssm_dtype"])
        size = bytes_on(how["backend"], cfg, how["dtype"], kept.kv, kept.ssm)
        check_room(size, max(asked["batches"]), max(asked["contexts"]), machine.available_memory())
    with options.load(**how) as engine:
        packed = packed_bytes(checkpoint, how["backend"])
        rows = rows_of(engine.runner, how["dtype"], threads, **asked, host=on_host, packed=packed)
        device = how["device"] or ("cuda" if how["backend"] == "cuda" else "cpu")
        layout = {name: how[name] for name in ("tp", "ep", "pp")} if several else {}
        yield next(rows) | {"device": device} | layout
        yield from rows


def packed_bytes(checkpoint: Checkpoint, backend: str) -> dict[str, int]:
    """Return the bytes of each tensor that a backend on a CPU reads as it is packed in the files, by name."""
    kinds = {"torch": set(KINDS), "cuda": set()}.get(backend)
    stored = checkpoint.stored.items()
    packed = {name: at for name, at in stored if at.dtype not in DTYPES}
    return {name: at.nbytes for name, at in packed.items() if kinds is None or at.dtype in kinds}


def checked(model: str, asked: dict) -> Checkpoint:
    """Return the checkpoint; InputError if its context is too short for what is asked."""
    checkpoint = Checkpoint.open(model)
    longest, room = max(asked["prompts"] + asked["contexts"]), checkpoint.config.max_position_embeddings
    if longest > room:
        raise InputError(f"{longest} tokens are more than the model's context of {room}")
    return checkpoint


def check_room(size: dict, batch: int, context: int, free: int) -> None:
    """Raise InputError if so many states, of the bytes that state_bytes returned, cannot fit."""
    need = batch * (size["ssm_bytes"] + size["conv_bytes"] + size["kv_bytes_per_token"] * context)
    if need > free:
        raise InputError(
            f"{batch} sequences of {context} tokens need {bytes_text(need)} beside the weights, "
            f"and {bytes_text(free)} of memory are free"
        )


def title(machine: dict) -> str:
    """Return what is measured, and what the machine can do."""
    if "tp" in machine:
        return f"{machine['device']}, ranks: tp {machine['tp']}, ep {machine['ep']}, pp {machine['pp']}"
    name = f"{machine['device']}, {machine['threads']} threads"
    if not machine["bandwidth"]:
        return name
    read, multiply = machine["bandwidth"] / 1e9, machine["matrix_peak"] / 1e9
    return f"{name}; the machine reads {read:.1f} GB/s and multiplies {multiply:.0f} GFLOP/s"

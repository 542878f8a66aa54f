"""refengine bench: how fast does a model run here?"""

from __future__ import annotations

import json

import click

from refengine.cli import options
from spec.config import InputError


class Numbers(click.ParamType):
    """Whole numbers with commas between them."""

    name = "N,N"

    def convert(self, value, param, ctx):
        try:
            numbers = [int(part) for part in value.split(",")] if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, such as 1,8", param, ctx)
        if not all(n >= 1 for n in numbers):
            self.fail("every number must be at least 1", param, ctx)
        return numbers


@click.command(short_help="How fast a model runs here.")
@options.engine
@click.option(
    "--prompt", "prompts", type=Numbers(), default="512", show_default=True, help="Lengths of prompts."
)
@click.option(
    "--batch", "batches", type=Numbers(), default="1,8", show_default=True, help="Sequences side by side."
)
@click.option(
    "--context", "contexts", type=Numbers(), default="64", show_default=True, help="Tokens before decoding."
)
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Prefills; the median counts."
)
@click.option(
    "--steps", type=click.IntRange(1), default=16, show_default=True, help="Decoded tokens; likewise."
)
@options.as_json
@options.debug
def bench(
    model, backend, dtype, device, threads, deterministic, prompts, batches, contexts, repeat, steps, as_json
):
    """Tokens per second, and the share of the machine: matrix peak (prefill), read bandwidth (decode)."""
    from threadpoolctl import threadpool_limits

    from refengine import backend as backends
    from refengine.bench import bench as measured
    from refengine.checkpoint import Checkpoint
    from refengine.report import bytes_text
    from spec.model import Model

    checkpoint = Checkpoint.open(model)
    cfg = checkpoint.config
    longest = max(prompts + contexts)
    if longest > cfg.max_position_embeddings:
        raise InputError(
            f"{longest} tokens are more than the model's context of {cfg.max_position_embeddings}"
        )
    on_host = backend != "cuda" and device in (None, "cpu")
    device = device or ("cpu" if on_host else "cuda")
    threads = threads or backends.processors()
    chosen = backends.make(backend, cfg, dtype, device, threads, deterministic)
    with threadpool_limits(threads):
        built = Model.build(cfg, checkpoint.read, chosen)
        rows = measured(built, dtype, threads, prompts, batches, contexts, repeat, steps, on_host)
        if as_json:
            for row in rows:
                click.echo(json.dumps(row))
            return
        machine = next(rows)
        click.echo(f"{backend}, {dtype}, {device}, {threads} threads{speeds(machine)}\n")
        click.echo("| | batch | tokens before | tokens/s | ms a step | share of the machine | peak memory |")
        click.echo("|---|---|---|---|---|---|---|")
        for row in rows:
            before = f"{row['tokens']}" if row["what"] == "decode" else f"prompt of {row['tokens']}"
            step = f"{row['milliseconds']:.1f}" if "milliseconds" in row else ""
            share = f"{row['share']:.0%}" if row["share"] else ""
            click.echo(
                f"| {row['what']} | {row['batch']} | {before} | {row['tokens_per_second']:.1f} | {step} | "
                f"{share} | {bytes_text(row['peak_memory'])} |"
            )


def speeds(machine: dict) -> str:
    if not machine["bandwidth"]:
        return ""
    read, multiply = machine["bandwidth"] / 1e9, machine["matrix_peak"] / 1e9
    return f"; the machine reads {read:.1f} GB/s and multiplies {multiply:.0f} GFLOP/s"

"""refengine quantize: write a copy of a model with packed weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from refengine.cli import options


@click.command(short_help="Write a copy of a model with packed weights.")
@click.argument("model", type=options.ModelName())
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    default="nvfp4",
    show_default=True,
    metavar="NAME",
    help="nvfp4, w4a16, w4a8, fp8, mxfp8, nano, super, ultra, lightning, or a file FILE.toml.",
)
@click.option("--four-over-six", is_flag=True, help="In NVFP4, scale each block to 6 or 4, as is closer.")
@options.as_json
@options.quiet
@options.debug
def quantize(model, out, recipe, four_over_six, as_json):
    """Write MODEL with packed weights into the new directory OUT.

    The weights are those of NVIDIA's modelopt, byte for byte; inputs stay in 16 bits. If the command is
    stopped, the same command goes on. Errors are the median, over the matrices of a role, of squared error
    over squared weights.
    """
    from refengine.checkpoint import Checkpoint
    from refengine.progress import progress
    from refengine.quantize import quantize as run
    from refengine.quantize import recipe_of
    from refengine.spec.tensors import parameters, table

    chosen = recipe_of(recipe, four_over_six)
    with Checkpoint.open(model) as checkpoint:
        total = parameters(table(checkpoint.config))
    with progress("quantizing", total, "element") as bar:
        found = run(model, out, chosen, advance=bar.update)
    click.echo(json.dumps(found) if as_json else text(found))


def text(found: dict) -> str:
    """Return a table of the errors by role."""
    lines = [f"{'role':16}{'matrices':>9}{'bits':>7}{'error':>11}{'4/6 gains':>11}"]
    for role, part in found.items():
        gain = f"{part['gain']:11.1%}" if part["gain"] else ""
        lines += [f"{role:16}{part['matrices']:9,}{part['bits']:7.2f}{part['error']:11.2e}{gain}"]
    return "\n".join(lines)

"""refengine quantize: write a copy of a model with packed weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from refengine.cli import options


@click.command(short_help="Write a copy of a model with packed weights.")
@click.argument("model", type=options.ModelName())
@click.argument("out", type=click.Path())
@click.option(
    "--recipe",
    default="nvfp4",
    show_default=True,
    metavar="NAME",
    help="nvfp4, w4a16, w4a8, fp8, mxfp8, nano, super, ultra, lightning, or a file FILE.toml.",
)
@click.option(
    "--four-over-six", is_flag=True, help="In NVFP4, scale each block to 6 or to 4, whichever is closer."
)
@click.option(
    "--evaluate/--no-evaluate",
    "evaluated",
    default=True,
    help="Compare the copy with MODEL on text, if MODEL fits in memory in float32.",
)
@click.option(
    "--calibrate", is_flag=True, help="Measure the scales of inputs and of an FP8 cache on text; write them."
)
@click.option(
    "--texts",
    type=options.FileName(),
    metavar="FILE",
    help="UTF-8 text to compare and calibrate on (its first 4,096 tokens).  [default: 20 short stories]",
)
@options.as_json
@options.quiet
@options.debug
def quantize(model, out, recipe, four_over_six, evaluated, calibrate, texts, as_json):
    """Write MODEL with packed weights into the new directory OUT.

    The weights are those of NVIDIA's modelopt, byte for byte; inputs stay in 16 bits. After a stop, the same
    command continues. The error of a role is the median, over its matrices, of squared error over squared
    weights. The loss of both models, and the KL divergence of the copy's distributions from those of MODEL,
    are in nats a token; top-1 is how often both have the same most likely token.
    """
    from refengine.checkpoint import Checkpoint
    from refengine.progress import progress
    from refengine.quantize import can_evaluate, evaluate, recipe_of
    from refengine.quantize import quantize as run
    from refengine.quantize.texts import TEXTS
    from refengine.spec.config import InputError
    from refengine.spec.tensors import parameters, table

    if not out:
        raise InputError("the name of the new directory is empty")
    if str(out) == model and not Path(out).exists():
        raise InputError(
            f"the directory {out} would hide the model {model} of the same name: give another name"
        )
    chosen = recipe_of(recipe, four_over_six)
    given = TEXTS if texts is None else [options.text_of(texts)]
    with Checkpoint.open(model) as checkpoint:
        model = checkpoint.directory  # OUT may not change what a name stands for
        total = parameters(table(checkpoint.config))
        fits = can_evaluate(checkpoint.config)
    with progress("quantizing", total, "element") as bar:
        found = run(model, out, chosen, texts=given if calibrate else None, advance=bar.update)
    losses = None
    if evaluated and not fits:
        options.note("not evaluated: the model takes more than half of the free memory in float32")
    elif evaluated:
        try:
            losses = evaluate(model, out, given)
        except InputError as error:  # the copy is whole
            options.note(f"not evaluated: {error}")
    if as_json:
        click.echo(json.dumps(found if losses is None else found | {"evaluation": losses}))
    else:
        click.echo(text(found) + ("" if losses is None else "\n" + text_of_losses(losses)))


def text_of_losses(losses: dict) -> str:
    """Return a line with the loss before and after, KL and top-1."""
    before, after = losses["loss_before"], losses["loss_after"]
    loss = f"loss {before:.4f} before, {after:.4f} after ({after - before:+.4f})"
    return f"{loss}, KL {losses['kl']:.4f}, top-1 {losses['top1']:.1%} of {losses['tokens']:,} tokens"


def text(found: dict) -> str:
    """Return a table of the errors by role."""
    lines = [f"{'role':16}{'matrices':>9}{'bits':>7}{'error':>11}{'4/6 gains':>11}"]
    for role, part in found.items():
        gain = f"{part['gain']:11.1%}" if part["gain"] else ""
        lines += [f"{role:16}{part['matrices']:9,}{part['bits']:7.2f}{part['error']:11.2e}{gain}"]
    return "\n".join(lines)

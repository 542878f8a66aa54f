"""refengine convert: write a model as a GGUF file."""

from __future__ import annotations

import json

import click

from refengine.cli import options


@click.command(short_help="Write a model as a GGUF file.")
@click.argument("model", type=options.ModelName())
@click.argument("out", type=click.Path())
@click.option(
    "--type",
    "kind",
    default="bf16",
    show_default=True,
    metavar="NAME",
    help="f32, bf16, q8_0, q4_0, mxfp4 or nvfp4.",
)
@click.option(
    "--evaluate/--no-evaluate",
    "evaluated",
    default=True,
    help="Compare the file with MODEL on text, if it is packed and MODEL fits in memory in float32.",
)
@options.as_json
@options.quiet
@options.debug
def convert(model, out, kind, evaluated, as_json):
    """Write MODEL as the new file OUT, which ends in .gguf: for llama.cpp and for refengine.

    A matrix whose rows are not whole blocks of the type is written in q8_0 or bf16. The loss of both models,
    and the KL divergence of the file's distributions from those of MODEL, are in nats a token; top-1 is how
    often both have the same most likely token.
    """
    from refengine.checkpoint import Checkpoint
    from refengine.cli.quantize import text_of_losses
    from refengine.convert import convert as run
    from refengine.progress import progress
    from refengine.quantize import can_evaluate, evaluate
    from refengine.spec.config import InputError
    from refengine.spec.tensors import parameters, table
    from refengine.units import bytes_text

    with Checkpoint.open(model) as checkpoint:
        total, fits = parameters(table(checkpoint.config)), can_evaluate(checkpoint.config)
    with progress("converting", total, "element") as bar:
        sizes = run(model, out, kind, bar.update)
    losses = None
    if evaluated and kind not in ("f32", "bf16"):
        if not fits:
            options.note("not evaluated: the model takes more than half of the free memory in float32")
        else:
            try:
                losses = evaluate(model, out)
            except InputError as error:  # the file is whole
                options.note(f"not evaluated: {error}")
    if as_json:
        click.echo(json.dumps({"bytes": sizes} | ({} if losses is None else {"evaluation": losses})))
        return
    by_type = ", ".join(f"{name} {bytes_text(size)}" for name, size in sizes.items())
    bits = 8 * sum(sizes.values()) / total
    click.echo(f"{out}: {bytes_text(sum(sizes.values()))}, {bits:.2f} bits an element: {by_type}")
    if losses is not None:
        click.echo(text_of_losses(losses))

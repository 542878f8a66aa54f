"""refengine inspect: what a checkpoint is."""

from __future__ import annotations

import json

import click

from refengine.cli import options


@click.command(short_help="Say what a model is.")
@click.argument("model", default="tiny")
@options.as_json
@options.debug
def inspect(model, as_json):
    """What MODEL is: layers, sizes, tensors and bytes by role, active parameters, state per sequence."""
    from refengine.anatomy import anatomy, text
    from refengine.checkpoint import Checkpoint

    found = anatomy(Checkpoint.open(model))
    click.echo(json.dumps(found) if as_json else text(found))

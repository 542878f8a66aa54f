"""refengine completion: completions for a shell."""

from __future__ import annotations

import click

from refengine.cli import options

SHELLS = ("bash", "zsh", "fish")


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(SHELLS), metavar="SHELL")
@options.debug
def completion(shell):
    """Print a script that completes commands and options in SHELL.

    bash: put  eval "$(refengine completion bash)"  into ~/.bashrc
    """
    from click.shell_completion import get_completion_class

    from refengine.cli import cli

    chosen = get_completion_class(shell)
    assert chosen is not None  # click has these three
    maker = chosen(cli, {}, "refengine", "_REFENGINE_COMPLETE")
    click.echo(maker.source_template % maker.source_vars())

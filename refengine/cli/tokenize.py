"""refengine tokenize: the token ids of a text, and the text of token ids."""

from __future__ import annotations

import json
import re

import click

from refengine.cli import options
from refengine.spec.config import InputError


@click.command(cls=options.Command, short_help="Print token ids of a text, or the text of ids.")
@click.argument("text", required=False)
@click.option("--prompt", "-p", "prompt", metavar="TEXT", help="The text, as an option.")
@click.option(
    "--file",
    "-f",
    "file",
    type=options.FileName(),
    metavar="FILE",
    help="Read the text from a file; - is stdin.",
)
@click.option("--ids", metavar="IDS", help='Token ids, as in "10 25 99": print their text.')
@click.option("--count", is_flag=True, help="Print the number of tokens only.")
@options.as_json
@options.model
@options.quiet
@options.debug
def tokenize(text, prompt, file, ids, count, as_json, model):
    """Print a line for each token of TEXT: its id and its text. Nothing is stripped from a file."""
    from refengine.checkpoint.generation_config import generation_config
    from refengine.checkpoint.locate import locate
    from refengine.text.tokenizer import Tokenizer

    text, prompt, file, ids = options.one_of(
        "TEXT, --prompt, --file and --ids", text=text, prompt=prompt, file=file, ids=ids
    )
    directory = locate(model)
    tokenizer = Tokenizer.load(directory)
    for note in generation_config(directory)[1]:
        options.note(note)
    if ids is not None:
        numbers = ids_of(ids)
        unknown = [i for i in numbers if tokenizer.token(i) is None]
        if unknown:
            raise InputError(f"the tokenizer has no token with the id {unknown[0]}")
        if count:
            click.echo(json.dumps({"count": len(numbers)}) if as_json else str(len(numbers)))
            return
        decoded = tokenizer.decode(numbers)
        click.echo(
            json.dumps({"token_ids": numbers, "text": decoded}, ensure_ascii=False) if as_json else decoded
        )
        return
    if text is None and prompt is None:
        if file is None and options.standard_input().isatty():
            raise click.UsageError("give a TEXT, --file or --ids, or pipe a text in")
        whole = options.text_of(file if file is not None else "-")
    else:
        whole = options.checked_text(text if text is not None else prompt, "the text")
    found = tokenizer.encode(whole)
    tokens = [tokenizer.decode([i]) for i in found]
    if count:
        click.echo(json.dumps({"count": len(found)}) if as_json else str(len(found)))
    elif as_json:
        click.echo(json.dumps({"text": whole, "token_ids": found, "tokens": tokens}, ensure_ascii=False))
    else:
        for i, token in zip(found, tokens, strict=True):
            click.echo(f"{i:7} {token!r}")


def ids_of(text: str) -> list[int]:
    """Return token ids written with spaces or commas between them; InputError where one is not a number."""
    words = re.split(r"[\s,]+", text.strip().removeprefix("[").removesuffix("]").strip())
    if wrong := [word for word in words if not re.fullmatch(r"[0-9]{1,18}", word)]:
        raise InputError(f'{wrong[0]!r} is not a token id: give whole numbers, as in "10 25 99"')
    return [int(word) for word in words]

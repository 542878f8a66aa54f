"""refengine chat: a conversation, through the checkpoint's own chat template."""

from __future__ import annotations

import json
import sys

import click

from refengine.cli import options
from refengine.cli.generate import summary
from spec.config import InputError


@click.command()
@click.argument("message", required=False)
@click.option("--system", metavar="TEXT", help="What the assistant is told before everything else.")
@click.option("--thinking/--no-thinking", default=True, help="Think before answering.  [default: thinking]")
@options.sampling
@options.as_json
@options.engine
@options.debug
def chat(message, system, thinking, stats, as_json, model, backend, dtype, device, threads, **sampling):
    """Answer MESSAGE; without it, talk: a line is a turn, /new forgets, Ctrl-D ends."""
    import refengine

    engine = refengine.load(model, backend=backend, dtype=dtype, device=device, threads=threads)
    opening = [{"role": "system", "content": options.checked_text(system, "--system")}] if system else []
    history = list(opening)
    for line in turns(message):
        if line == "/new":
            history = list(opening)
            continue
        history.append({"role": "user", "content": line})
        events = engine.generate(history, chat={"enable_thinking": thinking}, **sampling)
        reply = answer(events, thinking, as_json)
        said = {"content": reply["content"], "reasoning_content": reply["reasoning"]}
        history.append({"role": "assistant"} | said)
        if as_json:
            click.echo(json.dumps({"role": "assistant"} | reply, ensure_ascii=False))
        elif stats:
            click.echo(summary(reply["statistics"]), err=True)


def turns(message: str | None):
    """The user's turns: the one given, or the lines of standard input."""
    if message is not None:
        if not message:
            raise InputError("the message is empty")
        yield options.checked_text(message, "the message")
    elif sys.stdin.isatty():
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                click.echo()
                return
            if line:
                yield line
    else:
        yield from filter(None, (line.strip() for line in options.text_of("-").splitlines()))


def answer(events, thinking: bool, quiet: bool) -> dict:
    """Print a reply as it comes, the thinking dimmed; return its parts."""
    text, end = "", None
    for event in events:
        if not quiet:
            dim = thinking and "</think>" not in text and sys.stdout.isatty()
            click.echo(click.style(event.text, dim=True) if dim and event.text else event.text, nl=False)
            sys.stdout.flush()
        text += event.text
        end = event
    if not quiet:
        click.echo()
    from refengine.chat import split_reasoning

    reasoning, content = split_reasoning(text, thinking)
    return {"content": content, "reasoning": reasoning, "reason": end.reason, "statistics": end.statistics}

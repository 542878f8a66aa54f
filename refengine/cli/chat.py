"""refengine chat: a conversation, through the checkpoint's own chat template."""

from __future__ import annotations

import contextlib
import json

import click

from refengine.cli import options
from refengine.cli.generate import summary
from refengine.ranks.comm import RankError
from refengine.spec.config import InputError


@click.command(short_help="Talk, through the chat template.")
@click.argument("message", required=False)
@click.option("--system", metavar="TEXT", help="What the assistant is told before everything else.")
@click.option("--thinking/--no-thinking", default=True, help="Think before answering.  [default: thinking]")
@options.sampling
@options.as_json
@options.engine
@options.ranks
@options.debug
def chat(message, system, thinking, stats, as_json, **others):
    """Answer MESSAGE; without it, talk: a line is a turn, /new forgets, Ctrl-D ends."""
    how, sampling = options.parted(others)
    engine = options.load(**how)
    if options.follows():
        engine.follow()
        return
    opening = [{"role": "system", "content": options.checked_text(system, "--system")}] if system else []
    history = list(opening)
    someone_types = message is None and options.standard_input().isatty()
    for line in [message] if message is not None else typed() if someone_types else piped():
        if line == "/new":
            history = list(opening)
            continue
        try:
            asked = [*history, {"role": "user", "content": options.checked_text(line, "the message")}]
            if not line:
                raise InputError("the message is empty")
            events = engine.generate(asked, chat={"enable_thinking": thinking}, **sampling)
            reply = answer(events, thinking, as_json)
        except InputError as error:
            if not someone_types or isinstance(error, RankError):
                raise
            click.echo(f"refengine: {error}; /new forgets what was said", err=True)
            continue
        said = {"content": reply["content"], "reasoning_content": reply["reasoning"]}
        history = [*asked, {"role": "assistant"} | said]
        if as_json:
            click.echo(json.dumps({"role": "assistant"} | reply, ensure_ascii=False))
        else:
            if reply["reason"] in ("length", "context"):
                count = reply["statistics"]["new_tokens"]
                click.echo(f"(cut at {count} tokens: {reply['reason']})", err=True)
            if stats:
                click.echo(summary(reply["statistics"]), err=True)
    if stats:
        options.say_ranks(engine)
    engine.close()


def typed():
    """What a person types, a line a turn, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        if line:
            yield line


def piped():
    """The lines of standard input, each as soon as it is there."""
    for line in options.standard_input():
        if line := options.decoded(line, "standard input").strip():
            yield line


def answer(events, thinking: bool, quiet: bool) -> dict:
    """Print a reply as it comes, the thinking dimmed; return its parts."""
    text, end = "", None
    for event in events:
        if not quiet:
            dim = thinking and "</think>" not in text  # click leaves the style out where nobody looks
            options.say(click.style(event.text, dim=True) if dim and event.text else event.text)
        text += event.text
        end = event
    if not quiet:
        click.echo()
    from refengine.text.chat_template import split_reasoning

    reasoning, content = split_reasoning(text, thinking)
    return {"content": content, "reasoning": reasoning, "reason": end.reason, "statistics": end.statistics}

"""refengine generate: go on from a prompt."""

from __future__ import annotations

import json
import time

import click

from refengine.cli import options
from refengine.spec.config import InputError


@click.command(short_help="Go on from a prompt.")
@click.argument("prompt", required=False)
@click.option(
    "--file",
    "-f",
    "file",
    metavar="FILE",
    help="The prompt is in a file, less its last line end; - is stdin.",
)
@click.option("--prompts", metavar="FILE", help="One prompt a line; all run side by side.")
@click.option("--echo/--no-echo", default=True, help="Print the prompt before the text.  [default: echo]")
@click.option(
    "--logprobs",
    type=click.IntRange(0),
    metavar="N",
    help="A line a token: log-probability and the N likeliest.",
)
@options.sampling
@options.as_json
@options.engine
@options.ranks
@options.debug
def generate(prompt, file, prompts, echo, stats, as_json, **others):
    """Go on from PROMPT (or a file, or standard input), as text that streams."""
    how, sampling = options.parted(others)
    if options.follows():
        options.load(**how).follow()
        return
    texts = asked(prompt, file, prompts)
    engine = options.load(**how)
    events, began = engine.generate_batch(texts, **sampling), time.perf_counter()
    if as_json:
        statistics = as_objects(engine, texts, events)
    elif sampling["logprobs"] is not None:
        statistics = as_lines(engine, texts, events)
    else:
        statistics = as_text(texts, events, echo)
    if stats:
        say_statistics(statistics, time.perf_counter() - began)
        options.say_ranks(engine)
    engine.close()


def asked(prompt: str | None, file: str | None, prompts: str | None) -> list[str]:
    """The prompts, from whichever one source was named."""
    if sum(source is not None for source in (prompt, file, prompts)) > 1:
        raise click.UsageError("give one of PROMPT, --file and --prompts")
    if prompts is not None:
        lines = (line.removesuffix("\r") for line in options.text_of(prompts).split("\n"))
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise InputError(f"{options.named(prompts)} holds no prompt")
        return texts
    if prompt is None and file is None:
        if options.standard_input().isatty():
            raise click.UsageError("give a PROMPT, --file or --prompts, or pipe a text in")
        file = "-"
    text = options.checked_text(prompt) if prompt is not None else without_line_end(options.text_of(file))
    if not text:
        raise InputError("the prompt is empty")
    return [text]


def without_line_end(text: str) -> str:
    """A file ends with a line end that was not meant as part of the prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def as_text(texts: list[str], events, echo: bool) -> dict[int, dict]:
    """Stream the first text that is not done; the others wait for their turn, so all print in order."""
    waiting = [text if echo else "" for text in texts]
    done: dict[int, dict] = {}
    turn = 0
    options.say(waiting[turn])
    waiting[turn] = ""
    for i, event in events:
        waiting[i] += event.text
        if hasattr(event, "statistics"):
            done[i] = event.statistics
        while turn < len(texts):
            options.say(waiting[turn])
            waiting[turn] = ""
            if turn not in done:
                break
            turn += 1
            options.say("\n\n" if turn < len(texts) else "\n")
    return done


def as_lines(engine, texts: list[str], events) -> dict[int, dict]:
    """One line a token: the token, ln p, and the likeliest alternatives."""
    done = {}
    for i, event in events:
        if hasattr(event, "statistics"):
            done[i] = event.statistics
            continue
        top = "  ".join(f"{shown(engine, token)} {logprob:.3f}" for token, logprob in event.top)
        index = f"{i}  " if len(texts) > 1 else ""
        click.echo(f"{index}{shown(engine, event.id):16} {event.logprob:8.3f}   {top}".rstrip())
    return done


def shown(engine, token: int) -> str:
    """A token's text in quotes, so that spaces and line ends can be seen."""
    return repr(engine.tokenizer.decode([token], skip_special_tokens=False))


def as_objects(engine, texts: list[str], events) -> dict[int, dict]:
    """One JSON object a prompt, when it is done."""
    tokens: list[list] = [[] for _ in texts]
    done = {}
    for i, event in events:
        tokens[i].append(event)
        if not hasattr(event, "statistics"):
            continue
        *new, end = tokens[i]
        record = {
            "index": i,
            "prompt": texts[i],
            "text": "".join(e.text for e in tokens[i]),
            "reason": end.reason,
            "token_ids": [e.id for e in new],
        }
        if new and new[0].logprob is not None:
            record["logprobs"] = [
                {
                    "token_id": e.id,
                    "logprob": e.logprob,
                    "top": [{"token_id": token, "logprob": logprob} for token, logprob in e.top],
                }
                for e in new
            ]
        done[i] = end.statistics
        click.echo(json.dumps(record | {"statistics": end.statistics}, ensure_ascii=False))
    return done


def say_statistics(done: dict[int, dict], seconds: float) -> None:
    """A line a text, by its number, and where there are several one for all of them."""
    for i, statistics in sorted(done.items()):
        click.echo((f"{i}  " if len(done) > 1 else "") + summary(statistics), err=True)
    if len(done) > 1:
        read, new = (sum(s[count] for s in done.values()) for count in ("prompt_tokens", "new_tokens"))
        click.echo(
            f"all {len(done)}: prompts of {read} tokens and {new} new ones in {seconds:.2f} s, "
            f"{new / seconds:.0f} new tokens/s",
            err=True,
        )


def summary(s: dict) -> str:
    """The statistics of one text in one line."""
    from refengine.units import bytes_text

    speed = s["decode_tokens_per_second"]
    return (
        f"load {s['load_seconds']:.2f} s; prompt {s['prompt_tokens']} tokens, "
        f"{s['prefill_tokens_per_second']:.0f} tokens/s; new {s['new_tokens']} tokens, "
        f"{f'{speed:.0f} tokens/s' if speed else 'no speed'}; "
        f"peak memory {bytes_text(s['peak_memory_bytes'])}; seed {s['seed']}"
    )

"""refengine generate: continue a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import click

from refengine.cli import options
from refengine.cli.tokenize import ids_of
from refengine.generation import Options, PromptError
from refengine.spec.config import InputError
from refengine.untrusted import parse_json


@click.command(cls=options.Command, short_help="Continue a prompt.")
@click.argument("prompt", required=False)
@click.option("--prompt", "-p", "prompt_option", metavar="TEXT", help="The prompt, as an option.")
@click.option(
    "--file",
    "-f",
    "file",
    type=options.FileName(),
    metavar="FILE",
    help="Read the prompt from a file; - is stdin.",
)
@click.option(
    "--prompts", type=options.FileName(), metavar="FILE", help="One prompt per line; .jsonl: with options."
)
@click.option("--ids", metavar="IDS", help='Token ids as the prompt, as in "10 25 99".')
@click.option("--echo/--no-echo", default=True, help="Print the prompt too (default), or not.")
@click.option(
    "--logprobs", type=click.IntRange(0), metavar="N", help="Print each token, ln p and the N likeliest."
)
@click.option(
    "--save-state", type=options.FileName(), metavar="F", help="Save the state at the end of the text."
)
@click.option("--load-state", type=options.FileName(), metavar="F", help="Continue from a saved state.")
@options.batch
@options.cache
@options.sampling
@options.as_json
@options.engine
@options.ranks
@options.debug
def generate(
    prompt, prompt_option, file, prompts, ids, echo, save_state, load_state, stats, as_json, **others
):
    """Continue PROMPT, a file, or standard input; print text as it is generated.

    --json prints one object per prompt when that prompt is done, so not always in order ("index" counts from
    0). A wrong prompt in --prompts is reported on stderr, and the others run; the exit code is then 1.
    """
    how, sampling = options.parted(others)
    if options.follows():
        options.load(**how).follow()
        return
    sources = {"prompt": prompt, "prompt_option": prompt_option, "file": file, "prompts": prompts, "ids": ids}
    prompt, prompt_option, file, prompts, ids = options.one_of(
        "PROMPT, --prompt, --file, --prompts and --ids", **sources
    )
    chosen = prompt, prompt_option, file, prompts, ids
    goes_on = load_state is not None and all(value is None for value in chosen)
    given = [(None, {})] if goes_on else asked(*chosen)
    if save_state is not None:
        if prompts is not None:
            raise click.UsageError("--save-state saves the state of one text: give one prompt, not --prompts")
        check_place(save_state)
    engine = options.load(**how)
    if has_ids_only(engine) and not all(isinstance(prompt, str) for prompt, _ in given):
        options.note(f"{engine.tokenizer.lacks}, so ids are printed; for text, {engine.tokenizer.remedy}")
    began, prompts_given = time.perf_counter(), [prompt for prompt, _ in given]
    start = {"state": load_state, "keep": "end" if save_state else ""}
    events = engine.generate_batch(iter(given) if prompts else prompts_given, **start, **sampling)
    refused: list[PromptError] = []
    events = saving(reported(events, refused), save_state)
    texts = [shown_prompt(engine, prompt) for prompt in prompts_given]
    if as_json:
        statistics = as_objects(engine, prompts_given, texts, events)
    elif sampling["logprobs"] is not None:
        statistics = as_lines(engine, texts, events)
    else:
        statistics = as_text(engine, texts, events, echo)
    if stats:
        say_statistics(statistics, time.perf_counter() - began, options.backend_text(engine))
        options.say_ranks(engine)
    options.say_trouble(engine)
    engine.close()
    if refused:
        raise click.exceptions.Exit(1)


def reported(events, refused: list[PromptError]) -> Iterator[tuple]:
    """Yield the events; a prompt that is refused is reported on stderr, and its error is its only event."""
    while True:
        try:
            yield next(events)
        except StopIteration:
            return
        except PromptError as error:
            click.echo(f"refengine: {error}", err=True)
            refused.append(error)
            yield error.index, error


def saving(events, path: str | None) -> Iterator[tuple]:
    """Yield the events; the state at the end is saved in the file `path`, if there is one."""
    for i, event in events:
        if path is not None and getattr(event, "state", None) is not None:
            event.state.save(path)
        yield i, event


def check_place(path: str) -> None:
    """Raise InputError unless a file may be written there, as far as its directory tells."""
    if not path:
        raise InputError("the name of the file is empty")
    if not Path(path).parent.is_dir():
        raise InputError(f"{path} cannot be saved: {Path(path).parent} is not a directory")
    if Path(path).is_dir():
        raise InputError(f"{path} cannot be saved: it is a directory")


def asked(
    prompt: str | None, option: str | None, file: str | None, prompts: str | None, ids: str | None
) -> list[tuple]:
    """Return (prompt, its options) of each prompt, from the one source that was named."""
    prompt = option if prompt is None else prompt
    if ids is not None:
        return [(ids_of(ids), {})]
    if prompts is not None:
        lines = [line.removesuffix("\r") for line in options.text_of(prompts).split("\n")]
        if prompts.endswith(".jsonl"):
            given = [entry(line, f"line {n} of {prompts}") for n, line in enumerate(lines, 1) if line.strip()]
        else:
            given = [(line, {}) for line in lines if line.strip()]
        if not given:
            raise InputError(f"{options.named(prompts)} holds no prompt")
        return given
    if prompt is None and file is None:
        if options.standard_input().isatty():
            raise click.UsageError("give a PROMPT, --file or --prompts, or pipe a text in")
        file = "-"
    text = (
        options.checked_text(prompt)
        if prompt is not None
        else without_line_end(options.text_of(file or "" if file is not None else "-"))
    )
    if not text:
        raise InputError("the prompt is empty")
    return [(text, {})]


def entry(line: str, where: str) -> tuple:
    """Return (prompt, its options) from a line of JSON: "prompt" or "messages", and options of generate.

    The prompt of a line that cannot be read is the InputError that says why.
    """
    try:
        found = parse_json(line.encode(), where)
    except InputError as error:
        return error, {}
    if not isinstance(found, dict) or ("prompt" in found) == ("messages" in found):
        return InputError(f'{where} is not an object with either "prompt" or "messages"'), {}
    prompt = found.pop("prompt") if "prompt" in found else found.pop("messages")
    if unknown := sorted(set(found) - set(Options.__dataclass_fields__)):
        known = ", ".join(Options.__dataclass_fields__)
        return InputError(f"{where} has {unknown[0]!r}, which is not an option; there is {known}"), {}
    return prompt, found


def shown_prompt(engine, prompt: str | list[int] | None) -> str:
    """Return a prompt as text; token ids stay ids where there is no tokenizer.

    A prompt that is wrong has none: it is reported when it is reached.
    """
    if prompt is None:
        return ""
    if isinstance(prompt, str):
        return prompt
    try:
        return engine.tokenizer.decode(engine.ids(prompt))
    except InputError:
        return ""


def without_line_end(text: str) -> str:
    """Return the text of a file without the line end at its end, which is no part of the prompt."""
    return text.removesuffix("\n").removesuffix("\r")


def as_text(engine, texts: list[str], events, echo: bool) -> dict[int, dict]:
    """Print texts as they come, in order: others wait for the first that is not done. Return statistics.

    Several texts have a line before each: ==> 1 of 3 <==.
    """
    many = len(texts) > 1
    waiting = [f"==> {i} of {len(texts)} <==\n" * many + text * echo for i, text in enumerate(texts, 1)]
    done: dict[int, dict] = {}
    turn = 0
    options.say(waiting[turn])
    waiting[turn] = ""
    ended = set()
    for i, event in events:
        waiting[i] += text_of_event(engine, event)
        if hasattr(event, "statistics"):
            done[i] = event.statistics
        if not hasattr(event, "id"):
            ended.add(i)
        while turn < len(texts):
            options.say(waiting[turn])
            waiting[turn] = ""
            if turn not in ended:
                break
            turn += 1
            options.say("\n\n" if turn < len(texts) else "\n")
    return done


def text_of_event(engine, event) -> str:
    """Return the text of an event; without a tokenizer the id of a new token, after a space."""
    if isinstance(event, PromptError):
        return ""
    return f" {event.id}" if has_ids_only(engine) and hasattr(event, "id") else event.text


def has_ids_only(engine) -> bool:
    """Return whether the engine has no tokenizer."""
    from refengine.text.ids_only import IdsOnly

    return isinstance(engine.tokenizer, IdsOnly)


def as_lines(engine, texts: list[str], events) -> dict[int, dict]:
    """Print a line a token: the token, ln p, and the likeliest alternatives. Return statistics."""
    done = {}
    for i, event in events:
        if isinstance(event, PromptError):
            continue
        if hasattr(event, "statistics"):
            done[i] = event.statistics
            continue
        top = "  ".join(f"{quoted(engine, token)} {logprob:.3f}" for token, logprob in event.top)
        index = f"{i}  " if len(texts) > 1 else ""
        click.echo(f"{index}{quoted(engine, event.id):16} {event.logprob:8.3f}   {top}".rstrip())
    return done


def quoted(engine, token: int) -> str:
    """Return a token's text in quotes, so that spaces and line ends can be seen."""
    return repr(engine.tokenizer.decode([token], skip_special_tokens=False))


def as_objects(engine, prompts: list, texts: list[str], events) -> dict[int, dict]:
    """Print one JSON object a prompt, when it is done; after Ctrl-C, those begun. Return statistics."""
    tokens: list[list] = [[] for _ in texts]
    done: dict[int, dict] = {}
    try:
        for i, event in events:
            if isinstance(event, PromptError):
                click.echo(json.dumps({"index": i, "error": str(event.error)}, ensure_ascii=False))
            elif hasattr(event, "statistics"):
                done[i] = event.statistics
                click.echo(json.dumps(record(i, prompts, texts, tokens[i], event), ensure_ascii=False))
            else:
                tokens[i].append(event)
    except KeyboardInterrupt:
        for i, new in enumerate(tokens):
            if new and i not in done:
                click.echo(json.dumps(record(i, prompts, texts, new, None), ensure_ascii=False))
        raise
    return done


def record(i: int, prompts: list, texts: list[str], new: list, end) -> dict:
    """Return what is printed of one prompt; `end` is None where it was interrupted."""
    made = {"index": i, "prompt": texts[i]}
    if prompts[i] is not None and not isinstance(prompts[i], str):
        messages = isinstance(prompts[i][0], dict)
        made["messages" if messages else "prompt_token_ids"] = prompts[i]
    made |= {
        "text": "".join(e.text for e in new) + (end.text if end else ""),
        "reason": end.reason if end else "interrupted",
        "token_ids": [e.id for e in new],
    }
    if new and new[0].logprob is not None:
        made["logprobs"] = [
            {
                "token_id": e.id,
                "logprob": e.logprob,
                "top": [{"token_id": token, "logprob": logprob} for token, logprob in e.top],
            }
            for e in new
        ]
    return made | ({"statistics": end.statistics} if end else {})


def say_statistics(done: dict[int, dict], seconds: float, backend: str) -> None:
    """Print a line a text, by its number, and where there are several one for all of them.

    `backend`, a text about it, ends the last line.
    """
    for i, statistics in sorted(done.items()):
        number, end = (f"{i}  ", "") if len(done) > 1 else ("", f"; {backend}")
        click.echo(number + summary(statistics) + end, err=True)
    if len(done) > 1:
        read, new = (sum(s[count] for s in done.values()) for count in ("prompt_tokens", "new_tokens"))
        click.echo(
            f"all {len(done)}: prompts of {read} tokens and {new} new ones in {seconds:.2f} s, "
            f"{new / seconds:.0f} new tokens/s; {backend}",
            err=True,
        )


def summary(s: dict) -> str:
    """Return the statistics of one text in one line."""
    from refengine.units import bytes_text

    speed = s["decode_tokens_per_second"]
    return (
        f"load {s['load_seconds']:.2f} s; prompt {s['prompt_tokens']} tokens, "
        + (f"{s['reused_tokens']} of them reused, " if s["reused_tokens"] else "")
        + f"{s['prefill_tokens_per_second']:.0f} tokens/s; new {s['new_tokens']} tokens, "
        f"{f'{speed:.0f} tokens/s' if speed else 'no speed'}; "
        f"peak memory {bytes_text(s['peak_memory_bytes'])}; seed {s['seed']}" + drafts(s.get("speculation"))
    )


def drafts(s: dict | None) -> str:
    """Return how many drafts were accepted, for the line of statistics; empty without any speculation."""
    if s is None:
        return ""
    if not sum(s["drafted_by_position"]):
        return "; no drafts"
    shares = (
        f"{right / made:.0%}"
        for right, made in zip(s["accepted_by_position"], s["drafted_by_position"], strict=True)
        if made
    )
    return f"; {s['tokens_per_call']:.2f} tokens a call with drafts, accepted by position {' '.join(shares)}"

"""refengine chat: a conversation, through the checkpoint's own chat template."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refengine.cli import options
from refengine.cli.generate import check_place, summary
from refengine.ranks.comm import RankError
from refengine.ranks.launcher import launched
from refengine.spec.config import InputError

if TYPE_CHECKING:
    from refengine.states.state import State
    from refengine.text.chat_template import ChatTemplate

TINY = "The embedded model tells short stories and does small tasks with words; it knows nothing else."
COMMANDS = """\
/help            print this list
/exit            leave (also Ctrl-D, or Ctrl-C twice)
/new             forget the conversation; the system text stays
/system TEXT     change the system text; without TEXT there is none
/regen           answer the last message again
/save FILE       write the conversation as JSON
/load FILE       continue a conversation that was saved
/thinking on|off think before answering, or do not
/stats           print speed and memory of the last reply
A line that ends in \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
A message that begins with / is given with a space before it. Ctrl-C stops a reply."""


# Commands, and other names for them, that take nothing after them.
ALONE: tuple[str, ...] = (
    "/help",
    "/?",
    "/exit",
    "/quit",
    "/bye",
    "/new",
    "/clear",
    "/reset",
    "/regen",
    "/regenerate",
)
ALONE += ("/retry", "/stats")


class OnOff(click.ParamType):
    """Reads on or off as a truth value."""

    name = "on|off"

    def convert(self, value, param, ctx):
        """Return True for on, False for off; a usage error for anything else."""
        known = {"on": True, "off": False, "true": True, "false": False, "1": True, "0": False}
        if isinstance(value, bool):
            return value
        if value.lower() not in known:
            self.fail(f"{value!r} is not on or off", param, ctx)
        return known[value.lower()]


@click.command(cls=options.Command, short_help="Converse through the chat template.")
@click.argument("message", required=False)
@click.option("--prompt", "-p", "prompt", metavar="TEXT", help="The message, as an option.")
@click.option("--system", metavar="TEXT", help="Instructions before the conversation.")
@click.option(
    "--messages", type=options.FileName(), metavar="FILE", help="Begin with the messages of a JSON file."
)
@click.option(
    "--state",
    "state",
    type=options.FileName(),
    metavar="FILE",
    help="Continue and save a conversation in FILE.",
)
@click.option(
    "--tools", type=options.FileName(), metavar="FILE", help="JSON file of functions that it may call."
)
@click.option(
    "--template", type=options.FileName(), metavar="NAME", help="Name of a chat template, or a .jinja file."
)
@click.option(
    "--thinking",
    type=OnOff(),
    default="on",
    is_flag=False,
    flag_value="on",
    metavar="on|off",
    help="Think before answering.  [default: on]",
)
@click.option("--no-thinking", is_flag=True, hidden=True, help="The same as --thinking off.")
@click.option("--show-thinking/--hide-thinking", default=None, help="Print thoughts; default: on a terminal.")
@click.option(
    "--cache",
    type=options.Bytes(),
    default=2**30,
    metavar="BYTES",
    help="Keep states of earlier turns.  [default: 1GiB]",
)
@options.cache_dir
@options.sampling
@options.as_json
@options.engine
@options.ranks
@options.debug
def chat(
    message,
    prompt,
    system,
    messages,
    state,
    tools,
    template,
    thinking,
    no_thinking,
    show_thinking,
    stats,
    as_json,
    **others,
):
    """Answer MESSAGE; without it, converse: a line is a turn, /help lists commands, Ctrl-D ends.

    If standard input is not a terminal, each of its lines is a turn. --json prints each reply as a message
    that --messages reads.
    """
    how, sampling = options.parted(others)
    message, prompt = options.one_of("MESSAGE and --prompt", message=message, prompt=prompt)
    message = prompt if message is None else message
    messages, state_there = options.one_of(
        "--messages and --state of a conversation", messages=messages, state=state if there(state) else None
    )
    engine = options.load(**how)
    if options.follows():
        engine.follow()
        return
    talk = Talk(engine, sampling, thinking and not no_thinking, bool(stats), as_json, show_thinking)
    if template is not None:
        talk.template = engine.chat_template.named(template)
    if tools is not None:
        talk.tools = read_tools(tools)
    if state is not None:
        talk.go_on(state, state_there is not None)
    if messages is not None:
        talk.read(messages)
    if system:
        talk.set_system(options.checked_text(system, "--system"))
    someone_types = message is None and messages != "-" and options.standard_input().isatty()
    if message is not None:
        talk.turn(options.checked_text(message, "the message"))
    elif talk.history and talk.history[-1]["role"] in ("user", "tool"):
        talk.answer()
    elif messages == "-":
        raise InputError(
            "the last message on standard input is not one to answer: end with one of a user or a tool"
        )
    elif someone_types:
        talk.typed()
    else:
        with contextlib.suppress(Leave):
            for line in turns(piped()):
                talk.line(line)
    if stats:
        options.say_ranks(engine)
    options.say_trouble(engine)
    engine.close()


def there(path: str | None) -> bool:
    """Return whether the file of a talk exists; InputError where none can be."""
    if path is None:
        return False
    place = path and str(expanded(path))
    check_place(place)
    return Path(place).exists()


class Leave(Exception):
    """Raised where the user leaves the conversation."""


@dataclass
class Talk:
    """Holds a conversation, and makes and prints its replies."""

    engine: Any
    sampling: dict
    thinking: bool
    stats: bool
    as_json: bool
    show_thinking: bool | None
    history: list[dict] = field(default_factory=list)
    tools: list[dict] = field(default_factory=list)
    template: ChatTemplate | None = None
    statistics: dict | None = None
    path: Path | None = None  # of the file that the talk is saved in
    state: State | None = None  # of the talk, after the last message of the user
    stopped: bool = False  # whether Ctrl-C was the last key: once more leaves

    def typed(self) -> None:
        """Read turns from a terminal until the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and history)
        if self.engine.checkpoint.directory.name == "tiny":
            click.echo(TINY, err=True)
        click.echo("/help lists the commands; Ctrl-D leaves.", err=True)
        while True:
            try:
                line = next(turns(self.terminal()), None)
                if line is None:
                    click.echo()
                    return
                self.line(line)
            except Leave:
                return
            except KeyboardInterrupt:
                if self.stopped or launched().count > 1:
                    raise
                self.stopped = True  # after a reply that was stopped, too
                click.echo("\n(Ctrl-C again, or /exit, leaves)", err=True)
            except InputError as error:
                if isinstance(error, RankError):
                    raise
                click.echo(f"refengine: {error}", err=True)

    def terminal(self) -> Iterator[str]:
        """Yield what is typed, a line at a time, until Ctrl-D."""
        prompt = "> "
        while True:
            try:
                line = input(prompt)
            except EOFError:
                return
            self.stopped = False
            yield line
            prompt = "... "

    def line(self, line: str) -> None:
        """Do a command, or answer a message; an empty line does nothing. Leave is raised by /exit."""
        if line.startswith("/") and "\n" not in line:
            self.command(*line.strip().partition(" ")[::2])
        elif line.strip():
            self.turn(line.strip())

    def command(self, name: str, rest: str) -> None:
        """Do one of COMMANDS; InputError for an unknown one."""
        rest = rest.strip()
        if rest and name in ALONE:
            raise InputError(f"{name} takes no argument, but was given {rest!r}; /help lists the commands")
        if name in ("/exit", "/quit", "/bye"):
            raise Leave
        if name in ("/help", "/?"):
            click.echo(COMMANDS, err=True)
        elif name in ("/new", "/clear", "/reset"):
            self.history = [m for m in self.history[:1] if m["role"] == "system"]
        elif name == "/system":
            self.set_system(rest)
        elif name in ("/regen", "/regenerate", "/retry"):
            self.regenerate()
        elif name == "/save":
            self.save(rest)
        elif name == "/load":
            self.read(rest)
            click.echo(f"({len(self.history)} messages)", err=True)
        elif name == "/thinking" and rest in ("on", "off"):
            self.thinking = rest == "on"
        elif name == "/thinking":
            raise InputError("/thinking needs on or off")
        elif name == "/stats":
            click.echo(summary(self.statistics) if self.statistics else "(no reply yet)", err=True)
        else:
            raise InputError(
                f"there is no command {name}; /help lists them (a space before / sends it as text)"
            )

    def set_system(self, text: str) -> None:
        """Replace the system text; an empty one removes it."""
        rest = self.history[1:] if self.history[:1] and self.history[0]["role"] == "system" else self.history
        self.history = [{"role": "system", "content": text}] * bool(text) + rest

    def regenerate(self) -> None:
        """Answer the last message once more, with other random numbers."""
        kept = list(self.history)
        while kept and kept[-1]["role"] not in ("user", "tool"):
            kept.pop()
        if not kept:
            raise InputError("there is no message to answer again")
        seed = self.sampling.get("seed")
        self.attempt(kept, self.sampling if seed is None else self.sampling | {"seed": seed + 1})

    def save(self, path: str) -> None:
        """Write the conversation to a file of JSON."""
        from refengine.text.messages import conversation_text

        if not path:
            raise InputError("/save needs the name of a file")
        try:
            expanded(path).write_text(conversation_text(self.history, self.tools), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be written: {getattr(error, 'strerror', error)}") from None

    def read(self, path: str) -> None:
        """Take the conversation, and tools if there are any, from a file of JSON."""
        from refengine.text.messages import read_conversation

        if not path:
            raise InputError("/load needs the name of a file")
        found = options.text_of(path if path == "-" else str(expanded(path)))
        self.history, tools = read_conversation(found, options.named(path))
        self.tools = tools or self.tools

    def go_on(self, path: str, there: bool) -> None:
        """Save the talk in a file after each reply, and if the file is there, go on with the talk in it."""
        from refengine.states.state import State
        from refengine.text.messages import read_conversation

        self.path = expanded(path)
        if not there:
            return
        self.state = State.load(self.path)
        self.state.check(self.engine.fingerprint, self.engine.checkpoint.config, path)
        conversation = self.state.talk.get("conversation")
        if not isinstance(conversation, str):
            raise InputError(
                f"{path} is the state of a text, not of a conversation: generate --load-state continues it"
            )
        self.history, self.tools = read_conversation(conversation, f"the talk in {path}")

    def save_state(self, state: State | None) -> None:
        """Save the talk, with the state after the last message of the user, if it has a file."""
        from refengine.text.messages import conversation_text

        self.state = state or self.state
        if self.path is not None and self.state is not None:
            talk = {"conversation": conversation_text(self.history, self.tools)}
            self.state = replace(self.state, talk=talk, sampling={}, generator=None)
            self.state.save(self.path)

    def turn(self, text: str) -> None:
        """Answer a message of the user; a message that fails is not kept."""
        if not text:
            raise InputError("the message is empty")
        self.attempt([*self.history, {"role": "user", "content": text}], self.sampling)

    def attempt(self, history: list[dict], sampling: dict) -> None:
        """Answer the last message of a history; the talk stays as it was if there is no reply."""
        before = self.history, self.sampling
        self.history, self.sampling = history, sampling
        try:
            self.answer()
        finally:
            if self.history is history:
                self.history, self.sampling = before

    def answer(self) -> None:
        """Generate and print the reply to the last message, and keep it.

        KeyboardInterrupt is raised after a reply that Ctrl-C stopped was kept, as far as it went; InputError
        also after a reply was kept, where the file of the talk cannot be written.
        """
        from refengine.text.reply import Reply

        template = self.template or self.engine.chat_template
        prompt = template.prompt(self.history, self.tools or None, enable_thinking=self.thinking)
        ids = self.engine.tokenizer.encode(prompt.text, add_special_tokens=False)
        start: dict = {"keep": "turn"} if self.path is not None else {}
        known = self.state.ids if self.state is not None else ()
        if known and tuple(ids[: len(known)]) == known and len(ids) > len(known):
            start |= {"state": self.state}
            ids = ids[len(known) :]
        try:
            events = self.engine.generate(ids, **start, **self.sampling)
        except InputError as error:
            more = "; /new forgets what was said" if "context" in str(error) else ""
            raise InputError(f"{error}{more}") from None
        reply, end, interrupted = Reply(prompt.inside), None, False
        reason, statistics = "interrupted", None
        shown = Shown(self.show_thinking, self.as_json)
        try:
            for event in events:
                shown.say(reply.push(event.text))
                end = event
        except KeyboardInterrupt:
            if launched().count > 1:
                raise
            interrupted = True
        shown.say(reply.flush())
        shown.end()
        message = reply.message(self.tools, prompt.json_calls)
        self.history = [*self.history, message]
        if end is not None and not interrupted:
            reason, statistics = end.reason, end.statistics
            self.statistics = statistics
        if self.as_json:
            record = {"role": "assistant", "content": message["content"]}
            record["reasoning"] = message.get("reasoning_content", "")
            record |= {k: message[k] for k in ("tool_calls",) if k in message} | {"reason": reason}
            record |= {"statistics": statistics} if statistics else {}
            click.echo(json.dumps(record, ensure_ascii=False))
        elif statistics and reason in ("length", "context"):
            click.echo(f"(cut at {statistics['new_tokens']} tokens: {reason})", err=True)
        elif not message["content"].strip() and not interrupted and not shown.thinking:
            click.echo("(the model thought, and gave no answer; --show-thinking prints thoughts)", err=True)
        if self.stats and statistics:
            click.echo(summary(statistics), err=True)
        self.save_state(getattr(end, "state", None))
        if interrupted:
            raise KeyboardInterrupt


def expanded(path: str) -> Path:
    """Return the path that a user types, in which ~ is the home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such home directory") from None


class Shown:
    """Prints a reply: thoughts dimmed under a label on a terminal, left out elsewhere."""

    def __init__(self, thinking: bool | None, quiet: bool):
        terminal = sys.stdout is not None and sys.stdout.isatty()
        self.thinking, self.quiet = terminal if thinking is None else thinking, quiet
        self.part = ""

    def say(self, pieces: Iterable[tuple[str, str]]) -> None:
        """Print pieces of a reply."""
        for part, text in pieces:
            if self.quiet or (part == "thinking" and not self.thinking):
                continue
            dim = part == "thinking"
            if part != self.part and (dim or self.part):
                label = "[thinking]" if dim else "[answer]"
                options.say("\n" * bool(self.part) + click.style(label, dim=True) + "\n")
            self.part = part
            options.say(click.style(text, dim=True) if dim else text)

    def end(self) -> None:
        """Print the end of the last line."""
        if not self.quiet:
            click.echo()


def read_tools(path: str) -> list[dict]:
    """Return the functions in a JSON file."""
    from refengine.text.messages import tools_of
    from refengine.untrusted import parse_json

    return tools_of(parse_json(options.text_of(path).encode(), path), f"the tools in {path}")


def turns(lines: Iterator[str]) -> Iterator[str]:
    """Yield turns: lines, joined where one ends in a backslash, or between two of \"\"\"."""
    for line in lines:
        if line.strip().startswith('"""'):
            text = line.strip()[3:]
            while not text.rstrip().endswith('"""') and (more := next(lines, None)) is not None:
                text += "\n" + more
            yield " " + text.rstrip().removesuffix('"""').strip("\n")  # a space: never a command
            continue
        while line.endswith("\\") and (more := next(lines, None)) is not None:
            line = line[:-1] + "\n" + more
        yield line.removesuffix("\\")


def piped() -> Iterator[str]:
    """Yield the lines of standard input, each as soon as it is there."""
    for line in options.standard_input():
        yield options.decoded(line, "standard input").rstrip("\r\n")

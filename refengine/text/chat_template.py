"""Render messages as a prompt, by the checkpoint's own template; where there is none, by spec/chat.py.

The way back, from the text of a reply to a message, is refengine.text.reply.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from threading import Lock

import jinja2

from refengine.checkpoint.gguf import metadata
from refengine.checkpoint.gguf.texts import templates
from refengine.spec.chat import chat, split_reasoning
from refengine.spec.config import InputError
from refengine.spec.tools import read_calls
from refengine.text.messages import normalised
from refengine.text.sandbox import Sandbox
from refengine.untrusted import MAX_JSON, read_json, shown, size_of, unreadable

__all__ = ["ChatTemplate", "Prompt", "read_calls", "split_reasoning"]


@dataclass(frozen=True)
class Prompt:
    """Holds a rendered prompt, whether the reply begins `inside` a thought, and whether calls are JSON."""

    text: str
    inside: bool
    json_calls: bool = False


@dataclass
class ChatTemplate:
    """Holds the chat templates of a checkpoint by name, and the special tokens that they may print."""

    sources: dict[str, str] = field(default_factory=dict)  # by name: "default", perhaps "tool_use"; or none
    tokens: dict[str, str] = field(default_factory=dict)  # what they know by name: {"bos_token": "<s>", ...}
    choice: str | None = None  # the name of the template to render; None: by whether there are tools

    @classmethod
    def load(cls, directory: Path | str) -> ChatTemplate:
        """Read the templates of a checkpoint directory or a GGUF file; InputError where one cannot be read.

        The default is chat_template.jinja, or else what tokenizer_config.json has under "chat_template";
        named ones are in additional_chat_templates/NAME.jinja.
        """
        if Path(directory).is_file():
            return cls(*templates(Path(directory), metadata(Path(directory))))
        path = Path(directory) / "tokenizer_config.json"
        settings = read_json(path) if path.exists() else {}
        if not isinstance(settings, dict):
            raise InputError(f"{path} is not a JSON object")
        own = path.with_name("chat_template.jinja")
        sources = settings.get("chat_template") or {}
        if isinstance(sources, str):
            sources = {"default": sources}
        if isinstance(sources, list) and all(
            isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in sources
        ):
            sources = {entry["name"]: entry.get("template") for entry in sources}
        if not isinstance(sources, dict) or not all(map(is_text, chain(*sources.items()))):
            raise InputError(f"{path}: chat_template has to be a text or a list of named texts")
        more = sorted((path.parent / "additional_chat_templates").glob("*.jinja"))
        sources = sources | {file.stem: read_text(file) for file in more}
        if own.exists():
            sources["default"] = read_text(own)
        return cls(sources, named_tokens(settings))

    def named(self, name: str) -> ChatTemplate:
        """Return these templates with one chosen by its name, or by the path of a .jinja file."""
        if name.endswith(".jinja"):
            return ChatTemplate({"default": read_text(Path(name))}, self.tokens)
        if name not in self.sources:
            known = ", ".join(sorted(self.sources)) or "none by a name"
            raise InputError(f"there is no chat template {shown(name)}; the checkpoint has {known}")
        return ChatTemplate(self.sources, self.tokens, name)

    def render(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        *,
        add_generation_prompt: bool = True,
        **switches,
    ) -> str:
        """Return the prompt as text. `switches` are the template's own, such as enable_thinking.

        Messages are taken in every form that clients send (refengine.text.messages). InputError, in a
        sentence, where a message cannot be read or the template fails.
        """
        given = plain(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **switches)
        given["messages"] = normalised(given["messages"])
        try:
            if not self.sources:
                return chat(**given)
            with self.lock:  # of one budget, one template at a time
                self.sandbox.allow(given)
                return self.compiled(tools).render(self.tokens | given)
        except InputError:
            raise
        except jinja2.TemplateSyntaxError as error:
            what = shown(error.message or "")
            raise InputError(f"the chat template is not Jinja in line {error.lineno}: {what}") from None
        except Exception as error:  # a template is a program, and may fail in any way
            what = shown(str(error) or type(error).__name__)
            raise InputError(f"the chat template cannot render these messages: {what}") from None

    def prompt(self, messages: list[dict], tools: list[dict] | None = None, **switches) -> Prompt:
        """Return the prompt and how the reply to it is read.

        A reply begins inside a thought where the part of the prompt that begins the reply opens one, whatever
        the switches ask for.
        """
        text = self.render(messages, tools, **switches)
        try:
            before = self.render(messages, tools, add_generation_prompt=False, **switches)
        except InputError:  # a template may refuse to render no reply
            before = ""
        begun = text[len(before) :] if before and text.startswith(before) else ""
        inside = (
            begun.rfind("<think>") > begun.rfind("</think>") if begun else text.rstrip().endswith("<think>")
        )
        source = self.source(tools)
        json_calls = "<TOOLCALL>" in source and "<function=" not in source
        return Prompt(text, inside, json_calls)

    def source(self, tools) -> str:
        """Return the source of the template for these tools; empty where the checkpoint has none."""
        return self.sources[self.name(tools)] if self.sources else ""

    def name(self, tools) -> str:
        """Return the name of the template to render; InputError where none is the default."""
        wanted = [self.choice] if self.choice else ["tool_use", "default"] if tools else ["default"]
        for name in wanted:
            if name in self.sources:
                return name
        known = ", ".join(sorted(self.sources))
        raise InputError(
            f"the checkpoint has no default chat template: choose one of {known} (--template NAME)"
        )

    def compiled(self, tools) -> jinja2.Template:
        """Return the template for these tools, compiled."""
        name = self.name(tools)
        if name not in self.templates:
            self.templates[name] = self.sandbox.from_string(self.sources[name])
        return self.templates[name]

    @cached_property
    def sandbox(self) -> Sandbox:
        """Return the sandbox in which the templates run."""
        return Sandbox()

    @cached_property
    def templates(self) -> dict[str, jinja2.Template]:
        """Return the compiled templates by name."""
        return {}

    @cached_property
    def lock(self) -> Lock:
        """Return the lock that keeps one budget for one template at a time."""
        return Lock()


def plain(**given) -> dict:
    """Return a copy of what a template is given: texts, numbers, lists and dictionaries only."""
    try:
        return json.loads(json.dumps(given))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages, tools and switches have to be plain data: {error}") from None


def is_text(value) -> bool:
    """Return whether a value is a string of whole characters; JSON can spell halves of them."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def named_tokens(settings: dict) -> dict[str, str]:
    """Return `bos_token` and the like by name; a file writes one as a text or as {"content": text}."""
    named = {name: token for name, token in settings.items() if name.endswith("_token")}
    named = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items()}
    return {name: token for name, token in named.items() if isinstance(token, str)}


def read_text(path: Path) -> str:
    """Return the text of a template; InputError where it cannot be read."""
    if size_of(path) > MAX_JSON:
        raise InputError(f"{path} is far larger than a template: is it another file?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise unreadable(path, error) from None

"""Chat: messages to a prompt, by the checkpoint's own template; where there is none, by spec/chat.py.

The way back, `split_reasoning` and `read_calls`, is the same for the whole family and lives in the spec.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from threading import Lock

import jinja2

from refengine.spec.chat import chat, split_reasoning
from refengine.spec.config import InputError
from refengine.spec.tools import read_calls
from refengine.text.sandbox import Sandbox
from refengine.untrusted import MAX_JSON, read_json, shown, size_of, unreadable

__all__ = ["ChatTemplate", "read_calls", "split_reasoning"]


@dataclass
class ChatTemplate:
    sources: dict[str, str] = field(default_factory=dict)  # by name: "default", perhaps "tool_use"; or none
    tokens: dict[str, str] = field(default_factory=dict)  # what they know by name: {"bos_token": "<s>", ...}

    @classmethod
    def load(cls, directory: Path | str) -> ChatTemplate:
        """Read chat_template.jinja, or else what tokenizer_config.json has under "chat_template"."""
        path = Path(directory) / "tokenizer_config.json"
        settings = read_json(path) if path.exists() else {}
        if not isinstance(settings, dict):
            raise InputError(f"{path} has to hold a JSON object")
        own = path.with_name("chat_template.jinja")
        sources = read_text(own) if own.exists() else settings.get("chat_template") or {}
        if isinstance(sources, str):
            sources = {"default": sources}
        if isinstance(sources, list) and all(isinstance(entry, dict) for entry in sources):
            sources = {entry.get("name"): entry.get("template") for entry in sources}
        if not isinstance(sources, dict) or any(type(text) is not str for text in chain(*sources.items())):
            raise InputError(f"{path}: chat_template has to be a text or a list of named texts")
        return cls(sources, named_tokens(settings))

    def render(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        *,
        add_generation_prompt: bool = True,
        **switches,
    ) -> str:
        """The prompt. `switches` are the template's own, such as enable_thinking."""
        given = plain(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **switches)
        for message in given["messages"]:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InputError(f"a message needs a role and a content: {shown(message)}")
        try:
            if not self.sources:
                return chat(**given)
            with self.lock:  # of one budget, one template at a time
                self.sandbox.allow(given)
                return self.compiled(tools).render(self.tokens | given)
        except jinja2.TemplateSyntaxError as error:
            what = shown(error.message or "")
            raise InputError(f"the chat template is not Jinja in line {error.lineno}: {what}") from None
        except Exception as error:  # a template is a program, and may fail in any way
            what = shown(str(error) or type(error).__name__)
            raise InputError(f"the chat template cannot render these messages: {what}") from None

    def compiled(self, tools) -> jinja2.Template:
        wanted = ["tool_use", "default"] if tools else ["default"]
        name = next((name for name in wanted if name in self.sources), next(iter(self.sources)))
        if name not in self.templates:
            self.templates[name] = self.sandbox.from_string(self.sources[name])
        return self.templates[name]

    @cached_property
    def sandbox(self) -> Sandbox:
        return Sandbox()

    @cached_property
    def templates(self) -> dict[str, jinja2.Template]:
        return {}

    @cached_property
    def lock(self) -> Lock:
        return Lock()


def plain(**given) -> dict:
    """What a template sees: a copy, of nothing but texts, numbers, lists and dictionaries."""
    try:
        return json.loads(json.dumps(given))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages, tools and switches have to be plain data: {error}") from None


def named_tokens(settings: dict) -> dict[str, str]:
    """`bos_token` and the like, which a file writes as a text or as {"content": text}."""
    named = {name: token for name, token in settings.items() if name.endswith("_token")}
    named = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items()}
    return {name: token for name, token in named.items() if isinstance(token, str)}


def read_text(path: Path) -> str:
    if size_of(path) > MAX_JSON:
        raise InputError(f"{path} is far larger than a template: is it another file?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise unreadable(path, error) from None

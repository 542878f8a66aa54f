"""A reply as a message: its thinking, its answer and its calls, while the text is still arriving."""

from __future__ import annotations

import re

from refengine.spec.chat import MARK
from refengine.spec.tools import end_of_call, read_json_reply, read_reply

# Text that may still become a mark: the beginning of a tag, or <tool_call> before its function.
PARTIAL = re.compile(r"<(?:[/a-zA-Z_]{0,9}|tool_call>\s*(?:<[^>\n]*)?|TOOLCALL>\s*)\Z")


class Reply:
    """Turns text into pieces ("thinking" or "answer", text), as soon as it is certain which of them it is.

    However the text is cut, the pieces of each part together are what `split_reasoning` returns of the whole.
    """

    def __init__(self, inside: bool):
        self.inside, self.held = inside, ""
        self.parts = {"thinking": "", "answer": ""}
        self.begun, self.newlines = False, ""  # of the piece between two marks

    @property
    def part(self) -> str:
        """Return where the text goes on: in "thinking" or in "answer"."""
        return "thinking" if self.inside else "answer"

    def push(self, text: str) -> list[tuple[str, str]]:
        """Return the pieces that have become certain with this text."""
        self.held += text
        return [piece for piece in self.take(final=False) if piece[1]]

    def flush(self) -> list[tuple[str, str]]:
        """Return the pieces held back; call it when no more text follows."""
        return [piece for piece in self.take(final=True) if piece[1]]

    def take(self, final: bool):
        """Yield pieces of the text held, up to where text that follows could change their meaning."""
        while mark := MARK.search(self.held):
            is_call = mark[0] not in ("<think>", "</think>")
            end, certain = end_of_call(self.held, mark, self.inside) if is_call else (mark.end(), True)
            if end is None:  # only mentioned: text like any other
                yield self.piece(self.held[: mark.end()])
                self.held = self.held[mark.end() :]
                continue
            yield self.piece(self.held[: mark.start()])
            if not (certain or final):
                self.held = self.held[mark.start() :]
                return
            self.cut()
            self.inside = mark[0] == "<think>"
            if is_call:
                yield self.piece(self.held[mark.start() : end])
                self.cut()
            self.held = self.held[end:]
        partial = None if final else PARTIAL.search(self.held)
        certain_to = partial.start() if partial else len(self.held)
        yield self.piece(self.held[:certain_to])
        self.held = self.held[certain_to:]

    def cut(self) -> None:
        """Begin a new piece: line ends around it do not count."""
        self.begun, self.newlines = False, ""

    def piece(self, text: str) -> tuple[str, str]:
        """Return text as it joins its part, and keep it; line ends wait for what follows them."""
        part = self.part
        if not self.begun:
            text = text.lstrip("\n")
            self.begun = bool(text)
            text = "\n" + text if text and self.parts[part] else text
        text = self.newlines + text
        shown = text.rstrip("\n")
        self.newlines = text[len(shown) :]
        self.parts[part] += shown
        return part, shown

    def message(self, tools: list[dict] | None = None, json_calls: bool = False) -> dict:
        """Return the whole as a message: role, content, reasoning_content and tool_calls if there are any.

        Calls are read where there are tools; `json_calls`: in the form of Nano v2.
        """
        content, calls = self.parts["answer"], list[dict]()
        if tools:
            content, calls = read_json_reply(content) if json_calls else read_reply(content, tools)
        message: dict = {"role": "assistant", "content": content}
        if self.parts["thinking"]:
            message["reasoning_content"] = self.parts["thinking"]
        if calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return message

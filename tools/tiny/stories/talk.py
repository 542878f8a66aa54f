"""A chat as data: messages, tools, and how much each part of a reply is worth to the trainer.

The text of a chat is made by the chat template that the package ships, through the class that renders it for
the engine, so that the model learns from exactly the text that it is given later.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGED = Path(__file__).resolve().parents[3] / "refengine" / "models" / "tiny"
FORM, SEEN = 0.2, 0.0  # what every reply has in common; what the user and the tools write
_REPLY = re.compile(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", re.S)
_THOUGHT = re.compile(r"<think></think>|<think>\n(.*?)\n</think>\n", re.S)


@cache
def template():
    """Return the packaged chat template, as the engine loads it."""
    from refengine.text.chat_template import ChatTemplate

    return ChatTemplate.load(PACKAGED)


@dataclass
class Talk:
    """A chat that grows turn by turn; `taken` holds the names and things already bound in it."""

    messages: list = field(default_factory=list)
    replies: list = field(default_factory=list)  # (thought, pieces) of each reply, in order
    tools: list | None = None
    taken: set = field(default_factory=set)

    def system(self, text):
        """Put a system message first."""
        self.messages.insert(0, {"role": "system", "content": text})

    def user(self, text):
        """Add what the user writes."""
        self.messages.append({"role": "user", "content": text})

    def result(self, text):
        """Add what a tool returned."""
        self.messages.append({"role": "tool", "content": text})

    def reply(self, thought, *pieces, call=None):
        """Add a reply: its thought, its (text, weight) pieces, and perhaps one call (name, arguments)."""
        message = {"role": "assistant", "content": "".join(text for text, _ in pieces)}
        if call:
            function = {"name": call[0], "arguments": call[1]}
            message["tool_calls"] = [{"type": "function", "function": function}]
        self.messages.append(message)
        self.replies.append((thought, pieces))

    def with_thoughts(self):
        """Return the messages with the thought of every reply."""
        thoughts = iter(self.replies)
        return [
            {**m, "reasoning_content": next(thoughts)[0]} if m["role"] == "assistant" else m
            for m in self.messages
        ]

    def render(self, thinking):
        """Return the whole chat as (text, weight) pieces; their text is the template's."""
        messages = self.with_thoughts() if thinking else self.messages
        text = template().render(messages, self.tools, add_generation_prompt=False)
        out, at = [], 0
        for match, (_, pieces) in zip(_REPLY.finditer(text), self.replies, strict=True):
            out.append((text[at : match.start(1)], SEEN))
            out += _weighed(match[1], pieces)
            out.append(("<|im_end|>", 1.0))
            at = match.end()
        return out

    def prompt(self):
        """Return the messages before the last reply, as a client would send them."""
        return self.messages[:-1]

    @property
    def answer(self):
        """Return the text of the last reply."""
        return self.messages[-1]["content"]

    @property
    def calls(self):
        """Return the functions that the last reply calls: [{"name", "arguments"}]."""
        return [call["function"] for call in self.messages[-1].get("tool_calls", [])]


def _weighed(reply, pieces):
    """Return the pieces of one rendered reply: its thought, its content, its call."""
    thought = _THOUGHT.match(reply)
    if thought[1] is None:
        out = [(thought[0], SEEN)]
    else:
        out = [("<think>\n", SEEN), (thought[1], 1.0), ("\n</think>\n", 0.5)]
    rest = reply[thought.end() :]
    content = "".join(text for text, _ in pieces)
    assert rest.startswith(content), (rest, content)
    return [*out, *pieces, (rest[len(content) :], 1.0)]

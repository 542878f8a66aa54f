"""Chapter 19. Chat: write a conversation as text, and read the text of a reply as a message.

The engine renders the template of the checkpoint. The templates of this family produce:

    <|im_start|>system           always there, though it may be empty; tools are described at its end
    TEXT<|im_end|>
    <|im_start|>user             also for results of tools, each in <tool_response>
    TEXT<|im_end|>
    <|im_start|>assistant        a reply begins with its thinking, or with <think></think>
    <think>
    THINKING
    </think>
    TEXT TOOL CALLS<|im_end|>
    <|im_start|>assistant        the prompt ends inside a reply, so the model continues with its thinking;
    <think>                      if the prompt ends with <think></think>, it answers at once

The thinking is removed from replies before the user's last message. docs/model.md, "Chat".
"""

from __future__ import annotations

import re
from itertools import groupby

from refengine.spec.tools import BEGINNING, describe, end_of_call, write_call


def chat(
    messages: list[dict],
    tools: list[dict] | None = None,
    add_generation_prompt: bool = True,
    enable_thinking: bool = True,
    truncate_history_thinking: bool = True,
) -> str:
    """Return the prompt of messages {"role", "content", and of a reply "reasoning_content", "tool_calls"}."""
    told = [content(message) for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(told) :]
    system = [*told, describe(tools)] if tools else told
    text = turn("system", "\n\n".join(filter(None, system)))
    last = max((i for i, message in enumerate(turns) if message["role"] == "user"), default=-1)
    for role, run in groupby(enumerate(turns), key=lambda turn: turn[1]["role"]):
        if role == "tool":  # what tools returned one after the other shares a turn
            results = (f"<tool_response>\n{content(m)}\n</tool_response>\n" for _, m in run)
            text += turn("user", "".join(results))
        elif role == "assistant":
            text += "".join(turn(role, reply(m, truncate_history_thinking and i < last)) for i, m in run)
        else:
            text += "".join(turn(role, content(m)) for _, m in run)
    if add_generation_prompt:
        text += "<|im_start|>assistant\n" + ("<think>\n" if enable_thinking else "<think></think>")
    return text


def turn(role: str, text: str) -> str:
    """Return one turn of a conversation as text."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def content(message: dict) -> str:
    """Return the text of a message, whose content is a text or a list of parts."""
    parts = message.get("content") or ""
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


def reply(message: dict, forget_thinking: bool) -> str:
    """Return the text of an assistant's turn: its thinking, unless forgotten, its words and its calls."""
    thinking, text = message.get("reasoning_content") or "", content(message)
    if "</think>" in text:  # as the model wrote it
        thinking = thinking or text.split("</think>")[0].split("<think>")[-1]
        text = text.split("</think>")[-1].lstrip("\n")
    calls = "".join(write_call(call) for call in message.get("tool_calls") or ())
    words = text + "\n" + calls if text and calls else text + calls
    if forget_thinking or not thinking.strip():
        return "<think></think>" + words
    return "<think>\n" + thinking.strip("\n") + "\n</think>\n" + words


MARK = re.compile(rf"<think>|</think>|{BEGINNING.pattern}")


def split_reasoning(text: str, inside: bool = True) -> tuple[str, str]:
    """Return (thinking, answer) of what the model wrote, both without <think> and </think>.

    `inside`: whether the reply begins inside a thought, which the end of the prompt decides. The model may
    open another thought; </think> ends one, and so does a complete call. A call that is incomplete before
    </think> is text of the thought. Tags inside a call are ignored.
    """
    parts: dict[bool, list[str]] = {True: [], False: []}
    begin = at = 0  # where the piece begins, and where the next mark is looked for
    while mark := MARK.search(text, at):
        at = mark.end()
        is_call = mark[0] not in ("<think>", "</think>")
        end, _ = end_of_call(text, mark, inside) if is_call else (at, True)
        if end is None:
            continue
        parts[inside].append(text[begin : mark.start()])
        inside = mark[0] == "<think>"
        if is_call:
            parts[False].append(text[mark.start() : end])
        begin = at = end
    parts[inside].append(text[begin:])
    thinking, answer = (
        "\n".join(filter(None, (t.strip("\n") for t in parts[part]))) for part in (True, False)
    )
    return thinking, answer

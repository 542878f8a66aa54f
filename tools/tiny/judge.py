"""Judge answers of the embedded model: one small function for each kind of figure.

Each takes the text or message of the model and the right answer, and returns whether they agree.
"""

import re
from collections import Counter

from refengine.text.reply import Reply
from tools.tiny.stories import check


def first_line(text, answer):
    """Return whether the first line is the answer, word for word."""
    return text.split("\n")[0].strip() == answer


def message(text, thinking, tools=None):
    """Return the message that a client parses from the text of a reply."""
    reply = Reply(inside=thinking)
    reply.push(text)
    reply.flush()
    return reply.message(tools)


def said(reply, answer):
    """Return whether a message consists of exactly these words and has no tool call."""
    return reply["content"].strip() == answer and not reply.get("tool_calls")


CALL = re.compile(
    r"\s*<tool_call>\n<function=\w+>\n(?:<parameter=\w+>\n[^<>]*\n</parameter>\n)*</function>\n</tool_call>\s*"
)


def well_formed(text):
    """Return whether a reply, after its reasoning, is one tool call in exactly the template's form."""
    return bool(CALL.fullmatch(text.rsplit("</think>", 1)[-1]))


def called(reply, calls):
    """Return whether a message has exactly these tool calls: names, arguments and their types."""
    made = [call["function"] for call in reply.get("tool_calls", [])]
    made = [{"name": call.get("name"), "arguments": call.get("arguments")} for call in made]
    return repr(made) == repr(calls) and made == calls


def whole(text):
    """Return whether a text is a whole story, from opening to ending, made of the generator's sentences."""
    return check(text).parsed


def consistent(text):
    """Return whether one cast of names, things, places and pronouns explains the story."""
    return check(text).consistent


def requested(text, *wanted):
    """Return whether a story is whole and contains every wanted word."""
    return whole(text) and all(re.search(rf"\b{re.escape(word)}\b", text) for word in wanted)


def balance(loads):
    """Return the largest of a layer's token counts per expert, over their mean."""
    return float(max(loads) / (sum(loads) / len(loads)))


def share(judged):
    """Return the share of True among booleans; 0.0 if there are none."""
    judged = list(judged)
    return sum(judged) / len(judged) if judged else 0.0


def kinds(items):
    """Return how often each item occurs, the most frequent first, as text."""
    return ", ".join(f"{item} {count}" for item, count in Counter(items).most_common())

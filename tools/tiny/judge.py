"""Judge answers of the embedded model: one small function for each kind of figure.

Each takes the text or message that the model wrote and what was asked for, and returns whether it is right.
"""

import re
from collections import Counter

from refengine.text.reply import Reply
from tools.tiny.stories import check


def first_line(text, answer):
    """Return whether the first line is the answer, word for word."""
    return text.split("\n")[0].strip() == answer


def message(text, thinking, tools=None):
    """Return the message that a client reads from the text of a reply."""
    reply = Reply(inside=thinking)
    reply.push(text)
    reply.flush()
    return reply.message(tools)


def said(reply, answer):
    """Return whether a message answers in exactly these words and calls nothing."""
    return reply["content"].strip() == answer and not reply.get("tool_calls")


CALL = re.compile(
    r"\s*<tool_call>\n<function=\w+>\n(?:<parameter=\w+>\n[^<>]*\n</parameter>\n)*</function>\n</tool_call>\s*"
)


def well_formed(text):
    """Return whether a reply, after its thought, is one call in exactly the template's form."""
    return bool(CALL.fullmatch(text.rsplit("</think>", 1)[-1]))


def called(reply, calls):
    """Return whether a message makes exactly these calls: names, arguments and their types."""
    made = [call["function"] for call in reply.get("tool_calls", [])]
    made = [{"name": call.get("name"), "arguments": call.get("arguments")} for call in made]
    return repr(made) == repr(calls) and made == calls


def whole(text):
    """Return whether a text is a story from an opening to an ending, of known sentences."""
    return check(text).parsed


def consistent(text):
    """Return whether one cast of names, things, places and pronouns explains the story."""
    return check(text).consistent


def requested(text, *wanted):
    """Return whether a story is whole and has every wanted word in it."""
    return whole(text) and all(re.search(rf"\b{re.escape(word)}\b", text) for word in wanted)


def balance(loads):
    """Return the tokens of the busiest expert over the mean, of one layer's counts."""
    return float(max(loads) / (sum(loads) / len(loads)))


def share(judged):
    """Return the share of True among booleans; 0.0 of none."""
    judged = list(judged)
    return sum(judged) / len(judged) if judged else 0.0


def kinds(items):
    """Return how often each item occurs, the most frequent first, as text."""
    return ", ".join(f"{item} {count}" for item, count in Counter(items).most_common())

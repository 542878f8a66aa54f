"""Make held-out questions with their right answers, for every figure of the card.

The generators are those of the training text, with seeds that training never uses. Only the sums also occur
in training, because there are no more than a hundred.
"""

import random
from dataclasses import dataclass

from tools.tiny import judge
from tools.tiny.stories import chat, skills, tell, words

HELD_OUT_SEED = 90_001


@dataclass(frozen=True)
class Case:
    """A prompt (text, or messages with tools) and its right answer."""

    prompt: object
    answer: str
    calls: tuple = ()
    tools: object = None
    wanted: tuple = ()  # words that the story must contain

    def right(self, text, thinking=False):
        """Return whether `text`, the continuation of the prompt, is right."""
        if isinstance(self.prompt, str):
            return judge.first_line(text, self.answer)
        reply = judge.message(text, thinking, self.tools)
        if self.wanted:
            return judge.requested(reply["content"], *self.wanted)
        if self.calls:
            return judge.well_formed(text) and judge.called(reply, list(self.calls))
        return judge.said(reply, self.answer)


def seeded(name):
    """Return the random number generator for the cases of this name."""
    return random.Random(f"{HELD_OUT_SEED} {name}")


def text_of(pieces):
    """Return the joined text of (text, weight) pieces."""
    return "".join(text for text, _ in pieces)


def recall(count, stories, cases=40):
    """Return cases that ask one question after `count` facts and `stories` stories."""
    rng, out = seeded(f"recall {count} {stories}"), []
    for _ in range(cases):
        pairs = skills.facts(rng, count)
        name, thing = rng.choice(pairs)
        prompt = text_of(skills.state(pairs) + skills.between(rng, stories, pairs))
        out.append(Case(f"{prompt}\nQuestion: What does {name} have?\nAnswer:", f"{name} has the {thing}."))
    return out


def copying(size, cases=50):
    """Return cases that ask for a copy of `size` words."""
    rng = seeded(f"copying {size}")
    some = [" ".join(rng.sample(skills.COPY_WORDS, size)) for _ in range(cases)]
    return [Case(f"Copy: {s}\nAnswer:", s) for s in some]


def sums():
    """Return cases for all hundred sums of two digits."""
    both = [(a, b) for a in range(10) for b in range(10)]
    return [Case(f"Question: What is {a} + {b}?\nAnswer:", f"{a} + {b} = {a + b}.") for a, b in both]


def counting(cases=8):
    """Return `cases` cases for each count from one to nine."""
    rng = seeded("counting")
    counts = [(rng.choice(words.THINGS), n) for n in range(1, 10) for _ in range(cases)]
    return [Case(f"Count:{f' {w}' * n}\nAnswer:", f"{words.NUMBERS[n]}.") for w, n in counts]


def questions(cases=60):
    """Return cases that ask one question about a story."""
    rng, out = seeded("questions"), []
    for _ in range(cases):
        story = tell(rng)
        question, answer = rng.choice(story.questions)
        out.append(Case(f"{story.text}\n\nQuestion: {question}\nAnswer:", answer))
    return out


def chats(kind, cases=50):
    """Return cases that ask for the last reply of a chat; `kind` is one of `chat.SCENES` or `chat.ASKED`."""
    rng, out = seeded(f"chat {kind}"), []
    for _ in range(cases):
        talk = chat.scene(rng, kind)
        wanted = ()
        if kind == "story_about_both":
            wanted = tuple(w for w in words.NAMES + words.THINGS if f" {w}" in talk.messages[-2]["content"])
            wanted = tuple(w for w in wanted if w in talk.messages[-2]["content"].replace(".", "").split())
        out.append(Case(talk.prompt(), talk.answer, tuple(talk.calls), talk.tools, wanted))
    return out


# Figures of chats: the name on the card, the scene, the bar (None: reported without a bar).
CHATS = (
    ("greeting", "greet", 0.95), ("sums", "sums", 0.95), ("counting", "counting", None),
    ("copying", "copying", None), ("recall", "recall", 0.95),
    ("question on a given story", "question_given", 0.85),
    ("question on a story told before", "question_told", 0.85), ("honest answer", "beyond", 0.9),
    ("honest answer, forms never trained", "beyond_unseen", None),
    ("requested name and thing in a whole story", "story_about_both", 0.9),
    ("tool call add", "tool_add", 0.95), ("tool call weather", "tool_weather", 0.95),
    ("result of add used", "tool_add_used", 0.9), ("result of weather used", "tool_weather_used", 0.9),
)  # fmt: skip
# Bars of the other figures: (name of the figure, at least or at most, bar).
BARS = {
    "every sentence parses": (">=", 0.98), "names and objects consistent": (">=", 0.90),
    "longest run of words in 20000 training stories, median": ("<=", 27.0),
    "copying 10 words": (">=", 0.9),
    "one-digit sums (all 100)": (">=", 0.95), "counting to nine": (">=", 0.9),
    "questions about a story": (">=", 0.9), "MTP acceptance, greedy": (">=", 0.9),
}  # fmt: skip
BARS |= {
    f"chat, {name}, thinking {mode}": (">=", bar) for name, _, bar in CHATS if bar for mode in ("on", "off")
}


def bar_of(name):
    """Return the bar of the figure of this name as (">=" or "<=", number), or None."""
    if name.startswith("recall, "):
        return ">=", 0.98
    if name.startswith("expert load"):
        return "<=", 1.6
    return BARS.get(name)


def met(name, value):
    """Return whether a figure meets its bar, or None if it has no bar."""
    bar = bar_of(name)
    return None if bar is None else value >= bar[1] if bar[0] == ">=" else value <= bar[1]

"""Short chats through the chat template: greetings, stories on request, sums, recall, copying, questions.

The rendering here is the template's (`render` is tested equal to it); what the assistant says carries the
weight.
"""

from . import words
from .grammar import article
from .skills import COPY_WORDS, FORM, SEEN, facts, weigh
from .world import plots, tell

_GREET = ("Hello!", "Hi!", "Hi there!", "Good morning!", "Hello, how are you?", "Good evening!", "Hey!")
_GREETED = (
    "Hello! Would you like to hear a story?",
    "Hello! I am happy to see you. Shall I tell you a story?",
    "Hi! I can tell stories, remember small facts and add small numbers.",
)
_WHO = ("Who are you?", "What are you?", "What is your name?", "What can you do?")
_AM = ("I am a very small model that tells stories. I can also remember small facts and add small numbers.",)
_THANKS = ("Thank you!", "Thanks!", "That was nice.", "I liked that.")
_WELCOME = ("You are welcome! Come back for another story soon.",)


def turn(rng):
    """One exchange: (user pieces, thought, assistant pieces)."""
    kind = rng.choice(
        ("greet", "who", "story", "story", "story", "thing", "name", "sum", "recall", "copy", "question")
    )
    if kind == "greet":
        return (
            [(rng.choice(_GREET), SEEN)],
            "The user says hello. I will say hello too.",
            [(rng.choice(_GREETED), 1.0)],
        )
    if kind == "who":
        return [(rng.choice(_WHO), SEEN)], "The user asks who I am.", [(rng.choice(_AM), 1.0)]
    if kind in ("story", "thing", "name"):
        return _story(rng, kind)
    if kind == "sum":
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return (
            [(f"What is {a} + {b}?", SEEN)],
            f"I add {a} and {b}. That makes {a + b}.",
            [(f"{a} + {b} =", 0.5), (f" {a + b}", 1.0), (".", FORM)],
        )
    if kind == "recall":
        pairs = facts(rng, rng.randint(2, 5))
        name, thing = rng.choice(pairs)
        told = " ".join(f"{n} has the {t}." for n, t in pairs)
        return (
            [(f"Remember: {told} What does {name} have?", SEEN)],
            f"I was told that {name} has the {thing}.",
            [("You told me that", FORM), (f" {name} has the {thing}", 1.0), (".", FORM)],
        )
    if kind == "copy":
        some = " ".join(rng.sample(COPY_WORDS, rng.randint(2, 6)))
        return (
            [(f"Say these words: {some}", SEEN)],
            f"The words are {some}",
            [("Here they are:", FORM), (f" {some}", 1.0)],
        )
    story = tell(rng)
    question, answer = rng.choice(story.questions)
    return ([(f"{story.text}\n\n{question}", SEEN)], f"I look in the story. {answer}", [(answer, 1.0)])


def _story(rng, kind):
    if kind == "story":
        asked = rng.choice(
            ("Tell me a story.", "Please tell me a story.", "Can you tell me a story?", "A story, please!")
        )
        return [(asked, SEEN)], "The user wants a story. I will make one up.", weigh(tell(rng))
    letter = "T" if kind == "thing" else "H"
    plot = rng.choice([p for p in plots().values() if letter in p.slots])
    value = rng.choice(plot.slots[letter])
    what = article(value) if kind == "thing" else rng.choice((f"a {_child(value)} named {value}", value))
    told = weigh(tell(rng, plot.name, {letter: value}))
    return ([(f"Tell me a story about {what}.", SEEN)], f"The user wants a story about {what}.", told)


def _child(name):
    return "girl" if name in words.GIRLS else "boy"


def render(turns, thinking, system=""):
    """Pieces of a whole chat; only the last turn keeps its thought, as the template truncates history."""
    out = [(f"<|im_start|>system\n{system}<|im_end|>\n", SEEN)]
    for i, (user, thought, answer) in enumerate(turns):
        last = i == len(turns) - 1
        out += [
            ("<|im_start|>user\n", SEEN),
            *user,
            ("<|im_end|>\n", SEEN),
            ("<|im_start|>assistant\n", SEEN),
        ]
        if last and thinking:
            out += [("<think>\n", SEEN), (thought, 1.0), ("\n</think>\n", FORM)]
        else:
            out.append(("<think></think>", SEEN))
        out += [*answer, ("<|im_end|>", 1.0), ("\n", SEEN)]
    return out[:-1]


def chat(rng):
    turns = [turn(rng)]
    if rng.random() < 0.3:
        turns.insert(0, ([(rng.choice(_GREET), SEEN)], "", [(rng.choice(_GREETED), 1.0)]))
    if rng.random() < 0.15:
        turns.append(([(rng.choice(_THANKS), SEEN)], "The user says thank you.", [(_WELCOME[0], 1.0)]))
    return render(turns, rng.random() < 0.5)

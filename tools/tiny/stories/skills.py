"""Skills with answers that can be checked: recall, copying, counting, sums, questions about a story.

A document is a list of (text, weight) pieces; the weight says how much the trainer cares about the piece's
tokens: what can be known is worth 1, what is mere form a little, what is drawn at random nothing. Two rules
from experience: a prompt has exactly one right form of answer, and an answer about a name says the name
again before the value, so that the value is predicted next to its key. No name is bound to two things inside
a document.
"""

import re

from . import words
from .world import lines, tell

FORM, SEEN, STORY, BEGIN, PRONOUN, OTHER, KEPT = 0.2, 0.02, 0.6, 1.0, 2.0, 1.7, 1.8
_PRONOUNS = {w for pair in words.PRONOUNS.values() for w in pair}
COPY_WORDS = words.THINGS + words.PETS + words.WILD + words.PLACES + words.COLORS


def weigh(story):
    """A story in pieces; what must agree with what came before counts more.

    That is a name or thing said again, a friend's name (it is not the hero's), a pronoun, and how a sentence
    begins (it chooses what happens next).
    """
    pieces, said, since = [], set(), 0
    for part in re.split(r"(?<=\w)(?=\W)|(?<=\W)(?=\w)", story.text):
        weight = STORY
        if part in story.values.values():
            weight = KEPT if part in said else OTHER if part == story.values.get("F") else STORY
            said.add(part)
        elif part.lower() in _PRONOUNS:
            weight = PRONOUN
        elif since < 6:
            weight = BEGIN
        since = 0 if re.search(r"[.!?]", part) else since + 1
        pieces.append((part, weight))
    return pieces


def weigh_answer(answer, story):
    """Return the answer to a question about a story in pieces; what comes from its cast counts most."""
    parts = re.split(r"(?<=\w)(?=\W)|(?<=\W)(?=\w)", answer)
    return [(part, 2.0 if part in story.values.values() else 0.7) for part in parts]


def facts(rng, count):
    """`count` pairs of a name and the thing it has, all distinct."""
    return list(zip(rng.sample(words.NAMES, count), rng.sample(words.THINGS, count), strict=True))


def _has(name, thing, key, value):
    return [(f" {name}", key), (" has the", FORM), (f" {thing}", value), (".", FORM)]


def state(pairs):
    """Return facts as text: who has what."""
    out = [("Facts:", FORM)]
    for name, thing in pairs:
        out += _has(name, thing, SEEN, SEEN)
    return out


def ask(name, thing):
    """A question and its answer; both say the name, the answer restates it before the thing."""
    return [
        ("\nQuestion: What does", FORM),
        (f" {name}", SEEN),
        (" have?\nAnswer:", FORM),
        *_has(name, thing, 1.0, 1.0),
    ]


def ask_thing(name, thing):
    """Return a question about a thing and its answer, as `ask` does for a name."""
    return [
        ("\nQuestion: Who has the", FORM),
        (f" {thing}", SEEN),
        ("?\nAnswer: The", FORM),
        (f" {thing}", 1.0),
        (" is with", FORM),
        (f" {name}", 1.0),
        (".", FORM),
    ]


def between(rng, count, pairs):
    """`count` whole stories, as filler, in which none of the names and things of `pairs` occurs."""
    taken = {word for pair in pairs for word in pair}
    out = []
    for _ in range(count):
        out += [("\n\n", STORY), *weigh(tell(rng, exclude=taken)), ("\n", STORY)]
    return out


def recall(rng, count=None, stories=None, asked=None):
    """Facts, perhaps stories, then questions about the facts."""
    pairs = facts(rng, count or rng.choice((2, 3, 4, 4, 5, 6, 8, 8)))
    stories = rng.choice((0, 0, 0, 1)) if stories is None else stories
    out = state(pairs) + between(rng, stories, pairs)
    for name, thing in rng.sample(pairs, min(len(pairs), asked or len(pairs))):
        out += ask(name, thing) if rng.random() < 0.8 else ask_thing(name, thing)
    return out


def again(rng, count=None, rounds=2):
    """Facts, then the same facts once more in another order: the densest supervision of recall."""
    pairs = facts(rng, count or rng.choice((3, 4, 5, 6, 8)))
    out = state(pairs)
    for _ in range(rounds):
        out.append(("\nAgain:", FORM))
        for name, thing in rng.sample(pairs, len(pairs)):
            out += _has(name, thing, 0.05, 1.0)
    return out


def copying(rng, count=None):
    """Return words and the same words again."""
    words_ = rng.sample(COPY_WORDS, count or rng.randint(2, 12))
    return [
        ("Copy:", FORM),
        *((f" {w}", SEEN) for w in words_),
        ("\nAnswer:", FORM),
        *((f" {w}", 1.0) for w in words_),
    ]


def counting(rng, rounds=None):
    """Things to count, and their number; some rounds of it."""
    out = []
    for i in range(rounds or rng.randint(1, 5)):
        word, count = rng.choice(words.THINGS), rng.randint(1, 9)
        out += [
            ("\n" * (i > 0) + "Count:", FORM),
            (f" {word}" * count, SEEN),
            ("\nAnswer:", FORM),
            (f" {words.NUMBERS[count]}", 1.0),
            (".", FORM),
        ]
    return out


def running_count(rng):
    """Things counted aloud, a number after each: the densest practice of counting."""
    out = []
    for _ in range(rng.randint(2, 5)):
        word, count = rng.choice(words.THINGS), rng.randint(2, 9)
        out.append(("Count along:", FORM))
        for n in range(1, count + 1):
            out += [(f" {word}", SEEN), (f" {words.NUMBERS[n]}", 1.0)]
        out.append((".\n", FORM))
    return out


def sums(rng, rounds=None):
    """Return rounds of one-digit sums, asked and answered."""
    out = []
    for i in range(rounds or rng.randint(1, 6)):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        out += [
            ("\n" * (i > 0) + "Question: What is", FORM),
            (f" {a} + {b}", SEEN),
            ("?\nAnswer:", FORM),
            (f" {a} + {b} =", 0.5),
            (f" {a + b}", 1.0),
            (".", FORM),
        ]
    return out


def about_story(rng):
    """A story, then questions about it."""
    story = tell(rng)
    out = [*weigh(story), ("\n", STORY)]
    for question, answer in rng.sample(story.questions, rng.randint(1, min(3, len(story.questions)))):
        out += [(f"\nQuestion: {question}", 0.1), ("\nAnswer:", FORM), *weigh_answer(f" {answer}", story)]
    return out


def story(rng):
    """Return a story in pieces."""
    return weigh(tell(rng))


def cast_lines(rng):
    """Sentences about one cast: who is who must be kept from the first line on."""
    return [("Lines: ", FORM), *((t, FORM if w in (STORY, BEGIN) else w) for t, w in weigh(lines(rng)))]

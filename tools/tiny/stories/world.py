"""Stories: drawn from plots, told through templates, and checked by reading them back.

A plot is a list of steps; a step is a list of paraphrases; a paraphrase is one or more template sentences.
Openings, scenes, asides and endings are shared by all plots. The plots' text lives in `plots_*.py` and
`shared.py`:

    # name: H F T=ball,kite P        the slots it uses, with narrower values where the plot needs them
    first paraphrase || second      one step
    ? an optional step
    Q question = answer             a question about the story
        an indented line continues the one before
"""

import re
from dataclasses import dataclass
from functools import cache

from . import plots_home, plots_outdoors, plots_together, shared, words
from .grammar import Template, sentences, unify


@dataclass(frozen=True)
class Plot:
    """A plot: its slots, steps and questions."""

    name: str
    slots: dict  # letter -> allowed values
    steps: tuple  # of (optional, paraphrases); a paraphrase is a tuple of Templates
    questions: tuple  # of (Template, Template)


@dataclass(frozen=True)
class Story:
    """A story told: its plot, cast, text and questions with answers."""

    plot: str
    values: dict
    text: str
    questions: tuple  # of (question, answer) strings


@dataclass(frozen=True)
class Report:
    """The findings of `check`, each more than the one before.

    parsed: every sentence is one of ours, from an opening to an ending. consistent: one cast (names, things,
    places, pronouns) fits them all, and nobody turns up just once, unless the plot has it so. coherent: the
    sentences also belong to one plot.
    """

    parsed: bool
    consistent: bool = False
    coherent: bool = False
    plot: str = ""
    values: dict | None = None
    why: str = ""


def _unfold(text):
    """Join continuation lines (indented by four spaces) to the line they continue."""
    return re.sub(r"\n {4,}", " ", text)


def _paraphrases(line, plot, step):
    return tuple(tuple(Template(s, plot, step) for s in sentences(part.strip())) for part in line.split("||"))


def _read(source):
    plots = []
    source = _unfold(source)
    for block in re.split(r"^# ", source, flags=re.M)[1:]:
        head, *lines = [line.strip() for line in block.splitlines() if line.strip()]
        name, _, roles = head.partition(":")
        slots = {}
        for role in roles.split():
            letter, _, only = role.partition("=")
            slots[letter] = tuple(only.split(",")) if only else tuple(words.SLOTS[letter])
        steps, questions = [], []
        for line in lines:
            if line.startswith("Q "):
                q, a = line[2:].split(" = ")
                questions.append((Template(q, name), Template(a, name)))
            else:
                optional = line.startswith("? ")
                steps.append((optional, _paraphrases(line[2:] if optional else line, name, len(steps))))
        plots.append(Plot(name, slots, tuple(steps), tuple(questions)))
    return plots


@cache
def plots():
    """All plots by name."""
    return {
        p.name: p
        for source in (plots_outdoors.TEXT, plots_home.TEXT, plots_together.TEXT)
        for p in _read(source)
    }


@cache
def shared_steps():
    """Return the shared paragraphs by kind (opening, scene, aside, ending), each a list of paraphrases."""
    found = {}
    for kind, text in shared.TEXT.items():
        found[kind] = [p for line in _unfold(text).strip().splitlines() for p in _paraphrases(line, "", 0)]
    return found


def _fits(paraphrase, slots):
    return all(t.roles <= slots for t in paraphrase)


def cast(plot, rng, fixed=None, exclude=()):
    """One value for every slot: `fixed` where given, never one of `exclude`, no two alike in a pool."""
    values = dict(fixed or {})
    for letter, allowed in plot.slots.items():
        if letter in values:
            continue
        taken = {values.get(b if a == letter else a) for a, b in words.DISTINCT if letter in (a, b)}
        values[letter] = rng.choice([v for v in allowed if v not in taken and v not in exclude])
    return values


def tell(rng, plot=None, fixed=None, exclude=()):
    """One story. `plot` by name (else drawn), slots that are `fixed`, values to `exclude`."""
    everything = plots()
    if plot is None:
        wanted = fixed or {}
        plot = rng.choice(
            [
                n
                for n, p in everything.items()
                if all(k in p.slots and v in p.slots[k] for k, v in wanted.items())
            ]
        )
    plot = everything[plot]
    values = cast(plot, rng, fixed, exclude)
    if "J" not in values:
        values["J"] = rng.choice(words.TRAITS)
    slots, pieces = set(values), shared_steps()

    def draw(kind):
        return rng.choice([p for p in pieces[kind] if _fits(p, slots)])

    def say(paraphrase):
        return " ".join(t.tell(values, rng) for t in paraphrase)

    first = [say(draw("opening"))]
    if rng.random() < 0.4:
        first.append(say(draw("scene")))
    middle = []
    for optional, paraphrases in plot.steps:
        if optional and rng.random() < 0.4:
            continue
        middle.append(say(rng.choice(paraphrases)))
        if len(middle) == 1 and rng.random() < 0.25:
            middle.append(say(draw("aside")))
    text = "\n\n".join([" ".join(first), " ".join(middle), say(draw("ending"))])
    questions = tuple((q.tell(values, rng), a.tell(values, rng)) for q, a in (*plot.questions, *_GENERAL))
    return Story(plot.name, values, text, questions)


def lines(rng):
    """A cast, and sentences about it in no order, drawn from those of one plot that are fullest of slots.

    Not a story, but the densest practice there is in keeping one.
    """
    plot = plots()[rng.choice(list(plots()))]
    values = {"J": rng.choice(words.TRAITS), **cast(plot, rng)}
    every = [t for _, step in plot.steps for paraphrase in step for t in paraphrase if t.roles]
    dense = sorted(every, key=lambda t: len(t.text.split()) / len(re.findall(r"[{<]", t.text)))[:16]
    opening = rng.choice([p for p in shared_steps()["opening"] if _fits(p, set(values))])
    told = [t.tell(values, rng) for t in (*opening, *rng.sample(dense, len(dense)))]
    return Story(plot.name, values, " ".join(told), ())


_GENERAL = (
    (Template("What is the name of the {boy} in the story?"), Template("The {boy} is named {H}.")),
    (Template("Who is the story about?"), Template("The story is about {H}.")),
)


@cache
def _templates():
    out = [t for steps in shared_steps().values() for p in steps for t in p]
    out += [t for p in plots().values() for _, step in p.steps for para in step for t in para]
    return tuple(out)


@cache
def _endings():
    return {t for p in shared_steps()["ending"] for t in p[-1:]}


@cache
def _openings():
    return {t for p in shared_steps()["opening"] for t in p[:1]}


def parse(text):
    """For each sentence the list of (template, values, sexes) that can have said it; empty where none can."""
    out = []
    for sentence in sentences(text):
        hits = []
        for template in _templates():
            found = template.match(sentence)
            if found:
                hits.append((template, *found))
        out.append((sentence, hits))
    return out


def check(text):
    """Read a story back: is every sentence ours, does one cast explain them all, are they of one plot?"""
    read = parse(text)
    for sentence, hits in read:
        if not hits:
            return Report(False, why="not one of our sentences: " + sentence)
    if not read or not any(h[0] in _openings() for h in read[0][1]):
        return Report(False, why="it does not begin with an opening")
    if not any(h[0] in _endings() for h in read[-1][1]):
        return Report(False, why="it does not end with an ending")
    values, why = _one_cast(read)
    if values is None:
        return Report(True, why=why)
    for name, plot in plots().items():
        own = [(s, [h for h in hits if h[0].plot in ("", name)]) for s, hits in read]
        if all(hits for _, hits in own) and any(h[0].plot for _, hits in own for h in hits):
            narrow, _ = _one_cast(own)
            if narrow is not None and all(v in plot.slots[k] for k, v in narrow.items() if k in plot.slots):
                return Report(True, True, True, name, narrow)
    once = [n for n in words.NAMES if len(re.findall(rf"\b{n}\b", text)) == 1]
    if once:
        return Report(True, why=f"{once[0]} turns up only once")
    return Report(True, True, False, values=values, why="its sentences come from different plots")


def _one_cast(read):
    """Slot values that explain every sentence, and ''; or None, and the sentence at which that fails."""
    states = [{}]
    for sentence, hits in read:
        grown = {}
        for state in states:
            for _, values, sexes in hits:
                merged = unify(state, values, sexes)
                if merged is not None:
                    grown[tuple(sorted(merged.items()))] = merged
        states = list(grown.values())[:64]
        if not states:
            return None, "names or objects disagree: " + sentence
    return {k: v for k, v in states[0].items() if len(k) == 1}, ""

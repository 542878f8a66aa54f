"""Templates that are written once and used twice: to tell a story and to check one.

A template is a line of English with

    {H}         a slot: one value for the whole story (`words.SLOTS` says which)
    {a T}       the slot with its article: "a ball", "an umbrella"
    {he} {His}  a pronoun that agrees with slot H; {F.he} and {G.His} agree with F and G
    [big|tall]  a free choice; "a[ big|] dog" may be empty, and "[in the <P>|at home]" may hold slots

`Template.tell` fills a template in; `Template.match` reads a sentence back into its slot values. `check`
asks whether one assignment of slots explains every sentence of a story.
"""

import re
from dataclasses import dataclass, field

from . import words

_PIECE = re.compile(r"\{([^{}]+)\}|\[([^\[\]]*)\]")
# A sentence ends at . ! or ? (and a closing quote) when the next starts with a capital or an opening quote.
# In templates a capital slot ({H}, {He}, {F.He}) or choice ([One|Two]) is such a start too.
_BREAK = re.compile(
    r'(?<=[.!?]) (?=["A-Z])|(?<=[.!?]") (?=["A-Z])'
    r'|(?<=[.!?]) (?=\{(?:a )?(?:[A-Z]|[FG]\.[A-Z])|\[["A-Z])'
    r'|(?<=[.!?]") (?=\{(?:a )?(?:[A-Z]|[FG]\.[A-Z])|\[["A-Z])'
)


def sentences(text):
    """Split a text, or a template, at the same places."""
    return [part for line in text.split("\n") for part in _BREAK.split(line.strip()) if part]


def article(word):
    """Return a word with its article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def _slot(spec):
    """'{a T}' -> (letter T, form 'a'); '{F.His}' -> (F, 'His'); '{he}' -> (H, 'he')."""
    if spec.startswith("a "):
        return spec[2:], "a"
    if "." in spec:
        letter, form = spec.split(".")
        return letter, form
    return (spec, "") if spec in words.SLOTS else ("H", spec)


def _render(letter, form, values):
    if form == "":
        return values[letter]
    if form == "a":
        return article(values[letter])
    word = words.PRONOUNS[form.lower()][words.is_female(values[letter])]
    return word.capitalize() if form[0].isupper() else word


@dataclass(eq=False)
class Template:
    """One sentence pattern, with where it came from: `plot` ('' if shared) and its `step` there."""

    text: str
    plot: str = ""
    step: int = 0
    roles: frozenset = field(default=frozenset())

    def __post_init__(self):
        self.roles = frozenset(_slot(m[1])[0] for m in re.finditer(r"[{<]([^{}<>]+)[}>]", self.text))
        self._regex = self._groups = None
        literal = re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]", "\0", self.text)
        self.probe = max(literal.split("\0"), key=len)

    def tell(self, values, rng):
        """Fill in the template: every choice drawn from `rng`, every slot taken from `values`."""

        def one(match):
            if match[1]:
                return _render(*_slot(match[1]), values)
            return self._sub(rng.choice(match[2].split("|")), values)

        return _PIECE.sub(one, self.text)

    @staticmethod
    def _sub(text, values):
        return re.sub(r"<([^<>]+)>", lambda m: _render(*_slot(m[1]), values), text)

    def _compile(self):
        groups, out = [], []

        def group(spec):
            letter, form = _slot(spec)
            groups.append((letter, form))
            if form == "":
                options = words.SLOTS[letter]
            elif form == "a":
                options = [article(v) for v in words.SLOTS[letter]]
            else:
                options = [w.capitalize() if form[0].isupper() else w for w in words.PRONOUNS[form.lower()]]
            return "(" + "|".join(options) + ")"

        def literal(text):
            parts = re.split(r"<([^<>]+)>", text)
            return "".join(
                group(p) if i % 2 else re.escape(p).replace(r"\ ", " ") for i, p in enumerate(parts)
            )

        at = 0
        for m in _PIECE.finditer(self.text):
            out.append(literal(self.text[at : m.start()]))
            out.append(group(m[1]) if m[1] else "(?:" + "|".join(literal(c) for c in m[2].split("|")) + ")")
            at = m.end()
        out.append(literal(self.text[at:]))
        self._regex, self._groups = re.compile("".join(out)), groups

    def match(self, sentence):
        """Return the slot values and the sexes of its pronouns with which this template gives `sentence`."""
        if self.probe not in sentence:
            return None
        if self._regex is None:
            self._compile()
        found = self._regex.fullmatch(sentence)
        if not found:
            return None
        values, sexes = {}, {}
        for (letter, form), text in zip(self._groups, found.groups(), strict=True):
            if text is None:
                continue
            if form in ("", "a"):
                value = text.split(" ", 1)[1] if form else text
                if values.setdefault(letter, value) != value:
                    return None
            else:
                male, female = words.PRONOUNS[form.lower()]
                if male != female and sexes.setdefault(letter, text.lower() == female) != (
                    text.lower() == female
                ):
                    return None
        return values, sexes


def unify(known, values, sexes):
    """Add one sentence's values to the known ones; None if they disagree. Sexes are kept under 'H?'."""
    merged = dict(known)
    for letter, value in values.items():
        if merged.setdefault(letter, value) != value:
            return None
    for letter, female in sexes.items():
        if merged.setdefault(letter + "?", female) != female:
            return None
    for letter in ("H", "F", "G"):
        if letter in merged and merged.get(letter + "?", words.is_female(merged[letter])) != words.is_female(
            merged[letter]
        ):
            return None
    if any(a in merged and b in merged and merged[a] == merged[b] for a, b in words.DISTINCT):
        return None
    return merged

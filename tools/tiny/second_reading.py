# ruff: noqa: SIM905 (word lists read better as words)
"""Check stories a second time, more strictly, without the grammar that generated them.

The check has a few rules of English of its own, and only the lists of names and things in common with the
generator. `read` returns faults:

    pronoun    he or she where no one of that sex has been mentioned yet
    holder     one person gives or keeps a thing that another holds at that moment
    tense      a present tense outside speech (except after "that", for what is always true)
    repeated   a sentence told twice, or a word twice in a row
    speech     a quotation mark without its partner in a paragraph
"""

import re
from dataclasses import dataclass

from .stories import words

FAULTS = ("pronoun", "holder", "tense", "repeated", "speech")
_SEX = dict.fromkeys(words.GIRLS, "f") | dict.fromkeys(words.BOYS, "m")
_FEMALE = {
    "girl",
    "mother",
    "grandmother",
    "aunt",
    "lady",
    "woman",
    "queen",
    "sister",
    "daughter",
    "princess",
}
_MALE = {
    "boy",
    "father",
    "grandfather",
    "uncle",
    "man",
    "king",
    "brother",
    "son",
    "prince",
    "fisherman",
    "postman",
}
_EITHER = set(words.HELPERS) | set(words.PETS) | set(words.WILD) | {
    "child", "baby", "neighbor", "teacher", "friend", "captain", "principal", "mayor", "stranger", "clerk",
    "giant",
    "conductor", "nurse", "player", "guard", "dragon", "kitten", "bird", "cook", "driver", "owner", "judge",
}  # fmt: skip
_PRONOUN = {
    "he": "m",
    "him": "m",
    "his": "m",
    "himself": "m",
    "she": "f",
    "her": "f",
    "hers": "f",
    "herself": "f",
}
_PRESENT = set(
    "is are am has says wants goes takes gives finds runs looks comes sees thinks makes does knows loves "
    "likes plays walks asks tells cries laughs smiles sits stands holds keeps feels lives".split()
)
_GIVE = r"(?:gave|handed|lent|passed|returned|showed|sold|threw)"
_GET = r"(?:took|caught|grabbed|picked up|found|kept|hugged|carried|held|bought|got|received)"
_LOSE = r"(?:lost|dropped|hid|broke|left|forgot)"


@dataclass(frozen=True)
class Reading:
    """Faults by kind, each with the words at which it was found, and the holder of each thing at the end."""

    faults: tuple  # of (kind, words)
    holders: dict  # thing -> name of the last one known to hold it, or None

    def has(self, kind):
        """Return whether a fault of this kind was found."""
        return any(found == kind for found, _ in self.faults)


def sentences(text):
    """Return the sentences of a text; a quotation belongs to the sentence around it."""
    parts = re.split(r'(?<=[.!?])\s+(?=[A-Z"])|(?<=[.!?]")\s+(?=[A-Z"])|\n+', text)
    return [part.strip() for part in parts if part.strip()]


def narration(text):
    """Return a text without its quotations."""
    return re.sub(r'"[^"\n]*"', " ", text)


def _pronouns(text):
    """Yield pronouns before which no person of that sex was mentioned."""
    known = set()
    for sentence in sentences(text):
        tokens = re.findall(r"[A-Za-z]+", sentence)
        for token in tokens:
            lower = token.lower()
            if token in _SEX:
                known.add(_SEX[token])
            elif lower in _FEMALE or lower in _MALE:
                known.add("f" if lower in _FEMALE else "m")
            elif lower in _EITHER:
                known |= {"f", "m"}
        for token in tokens:
            if _PRONOUN.get(token.lower(), "") not in known | {""}:
                yield f"{token}: {sentence}"


def _holding(text):
    """Return (faults, holder of each thing at the end), from the gifts in the narration."""
    holders, faults, last = {}, [], {"m": None, "f": None}
    name = "|".join((*_SEX, "he", "He", "she", "She", "him", "her"))
    thing = rf"(?:a|an|the|his|her)(?: \w+)? (?P<thing>{'|'.join(words.THINGS)})\b"
    gift = re.compile(
        rf"\b(?P<who>{name}) {_GIVE} (?:(?P<to>{name}) {thing}|{thing.replace('thing>', 'thing2>')}"
        rf"(?: back)? to (?P<to2>{name}))\b"
    )
    other = re.compile(rf"\b(?P<who>{name}) (?:(?P<get>{_GET})|(?P<lose>{_LOSE})) {thing}")

    def person(word):
        return word if word in _SEX else last[_PRONOUN[word.lower()]]

    for sentence in sentences(narration(text)):
        found = gift.search(sentence) or other.search(sentence)
        if found:
            parts = found.groupdict()
            who, what = person(parts["who"]), parts["thing"] or parts.get("thing2")
            holder = holders.get(what)
            receiver = parts.get("to") or parts.get("to2")
            if (
                (receiver or re.search(r"\b(kept|hugged|carried|held)\b", sentence))
                and holder
                and who
                and holder != who
            ):
                faults.append(f"{who}, not {holder}: {sentence}")
            if receiver:
                holders[what] = person(receiver)
            else:
                holders[what] = None if parts.get("lose") else who
        for token in re.findall(r"[A-Z][a-z]+", sentence):
            if token in _SEX:
                last[_SEX[token]] = token
    return faults, holders


def _tenses(text):
    """Yield verbs in the present tense in the narration."""
    for sentence in sentences(narration(text)):
        told = re.split(r"\bthat\b|\bhow\b|\bbecause\b", sentence)[0]
        for token in re.findall(r"[A-Za-z]+", told):
            if token.lower() in _PRESENT:
                yield f"{token}: {sentence}"


def _repeated(text):
    """Yield sentences that occur twice, and words that occur twice in a row."""
    seen = set()
    for sentence in sentences(text):
        plain = " ".join(re.findall(r"[a-z]+", sentence.lower()))
        if plain in seen and len(plain.split()) > 3:
            yield sentence
        seen.add(plain)
        twice = re.search(r"\b([a-z]+) \1\b", sentence)
        if twice:
            yield twice[0]


def read(text):
    """Return the faults and holders found in a story."""
    odd = [p for p in text.split("\n") if p.count('"') % 2]
    holding, holders = _holding(text)
    faults = [("pronoun", f) for f in _pronouns(text)] + [("holder", f) for f in holding]
    faults += [("tense", f) for f in _tenses(text)] + [("repeated", f) for f in _repeated(text)]
    return Reading((*faults, *(("speech", p) for p in odd)), holders)

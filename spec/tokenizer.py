"""Chapter 17. The tokenizer: text to numbers and back, by byte-level byte-pair encoding.

    kind   one letter for what a character is       piece  the UTF-8 bytes of, say, a word
    token  a string of bytes that has an id         rank   the place of a merge in the list of merges

Text is cut into pieces, and no token crosses a cut. A piece starts as single bytes; then the two neighbours
whose merge has the lowest rank become one token, over and over, until no two neighbours can merge:

    "the story" -> "the", " story"     ␣ s t o r y -> ␣s t o r y -> ␣s t or y -> ␣st or y -> ␣st ory -> ␣story

Every byte is a token, so any text can be written and no token is unknown. Special tokens (`<|im_end|>`) are
found whole before the text is cut. Facts and sources: docs/model.md, "Tokenizer".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from unicodedata import category

from refengine.spec.config import InputError

# KINDS. Whether to cut between characters depends only on what kind of character each is:
#     U upper or title case   l lower case   o letter without case   m mark put on a letter   d digit
#     r line end              _ space        s other white space     / slash                  p all others
KIND_OF_CHARACTER = {"\n": "r", "\r": "r", " ": "_", "/": "/", "\t": "s", "\v": "s", "\f": "s", "\x85": "s"}
KIND_OF_CATEGORY = {"Lu": "U", "Lt": "U", "Ll": "l", "Lm": "o", "Lo": "o", "Zs": "s", "Zl": "s", "Zp": "s",
                    "Mn": "m", "Mc": "m", "Me": "m", "Nd": "d", "Nl": "d", "No": "d"}  # fmt: skip

# CUTS. A tokenizer file states them as a regular expression over characters; here is the same one over kinds.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {TEKKEN: re.compile("""
    [^rUlod]? [Uom]* [lom]+     # a word and the one character before it: "word", " Word", "(word"
  | [^rUlod]? [Uom]+ [lom]*     # a word in capitals; "camelCase" was two words
  | d                           # each digit alone
  | _? [mp/]+ [r/]*             # a run of signs, the space before it, the line ends after it
  | [s_r]* r+                   # blank lines
  | [s_r]+ (?![^s_r])           # white space, but for the last, which goes with the next word
  | [s_r]+                      # the one that is left when no word takes it
""", re.VERBOSE)}  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """Holds the tokens and merges of a tokenizer file; turns text into ids and back."""

    ids: dict[bytes, int]  # of the tokens that text is made of
    specials: dict[str, int]  # of the tokens that are found whole
    ranks: dict[tuple[bytes, bytes], int]  # of the merges
    cuts: re.Pattern

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return [i for part in self.special.split(text) for i in self.spell(part)]

    def spell(self, part: str) -> list[int]:
        """Return the ids of a special token, or of a text without any."""
        if part in self.specials:
            return [self.specials[part]]
        kinds = "".join(KIND_OF_CHARACTER.get(c) or KIND_OF_CATEGORY.get(category(c), "p") for c in part)
        pieces = (part[cut.start() : cut.end()].encode() for cut in self.cuts.finditer(kinds))
        return [self.ids[token] for piece in pieces for token in self.merge(piece)]

    def merge(self, piece: bytes) -> list[bytes]:
        """Return the tokens of a piece, after all merges."""
        tokens = [bytes([byte]) for byte in piece]
        while True:
            merges = [(self.ranks[p], at) for at, p in enumerate(pairwise(tokens)) if p in self.ranks]
            if not merges:
                return tokens
            _, at = min(merges)  # of equal ones, the leftmost
            tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    @cached_property
    def special(self) -> re.Pattern:
        """Return a pattern that finds the special tokens in a text, the longest first."""
        longest_first = map(re.escape, sorted(self.specials, key=len, reverse=True))
        return re.compile(f"({'|'.join(longest_first) or '(?!)'})")  # (?!) matches nothing

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        """Return the bytes of every token by its id."""
        specials = {text.encode(): i for text, i in self.specials.items()}
        return {i: token for token, i in (self.ids | specials).items()}


def from_json(file: dict) -> Tokenizer:
    """Return the tokenizer in a parsed `tokenizer.json`; InputError if it is of another kind than above."""
    match file:
        case {
            "normalizer": None, "post_processor": None | {"type": "ByteLevel"}, "added_tokens": added,
            "pre_tokenizer": {"pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]},
            "model": {"type": "BPE", "ignore_merges": False, "vocab": vocab, "merges": merges},
        } if not any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added):  # fmt: skip
            if pattern not in CUTS:
                raise InputError(f"the specification does not know this tokenizer's pattern: {pattern}")
            specials = {token["content"]: token["id"] for token in added}
            ids = {as_bytes(token): i for token, i in vocab.items() if token not in specials}
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
            ranks = {(as_bytes(left), as_bytes(right)): rank for rank, (left, right) in enumerate(pairs)}
            return Tokenizer(ids, specials, ranks, CUTS[pattern])
    raise InputError("the specification reads only byte-level BPE that cuts by a pattern and adds nothing")


# PRINTABLE BYTES. The file writes each byte of a token as a character: itself if it prints, else the next one
# from U+0100 on. " story" is written "Ġstory".
PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(0x100) if byte not in PRINTS]
BYTE_OF = {chr(byte): byte for byte in PRINTS} | {chr(0x100 + n): byte for n, byte in enumerate(HIDDEN)}


def as_bytes(token: str) -> bytes:
    """Return the bytes of a token as the file spells it."""
    return bytes(map(BYTE_OF.__getitem__, token))

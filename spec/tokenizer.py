"""Text to token ids and back: byte-level byte-pair encoding.

    text   a string; each character is one code point        kind   one letter for what a character is (below)
    piece  the UTF-8 bytes of a word or the like             rank   the place of a merge in the list of merges
    token  a string of bytes with an id                      id     a row of the embedding

Text is cut into pieces, and tokens never cross a cut. A piece starts as single bytes; then the two neighbours whose
merge has the lowest rank become one token, until no neighbours can merge:

    "Hi you" -> "Hi" " you" -> H i   ␣ y o u -> H i   ␣ yo u -> Hi   ␣ yo u -> Hi   ␣yo u -> Hi   ␣you

All 256 bytes are tokens, so there is no text that cannot be written, and no unknown token. Special tokens, such as
`<|im_start|>`, are found before everything else. Facts and sources: docs/model.md, "Tokenizer".
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from spec.config import InputError

# KINDS. Whether to cut between two characters depends only on what kind each of them is.
#     U upper or title case   l lower case   o letter without case   m mark that joins a letter   d digit
#     r line end              _ space        s other white space     / slash                      p all the rest
KIND_OF_CATEGORY = {"Lu": "U", "Lt": "U", "Ll": "l", "Lm": "o", "Lo": "o", "Zs": "s", "Zl": "s", "Zp": "s"}
KIND_OF_LETTER = {"M": "m", "N": "d"}
KIND_OF_CHARACTER = {"\n": "r", "\r": "r", " ": "_", "/": "/", "\t": "s", "\v": "s", "\f": "s", "\x85": "s"}


def kind(char: str) -> str:
    category = unicodedata.category(char)
    return (KIND_OF_CHARACTER.get(char) or KIND_OF_CATEGORY.get(category) or KIND_OF_LETTER.get(category[0], "p"))


# A tokenizer file states its cuts as a regular expression over characters; ours is the same one over kinds.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {TEKKEN: re.compile("""
    [^rUlod]? [Uom]* [lom]+     # a word with what stands before it: "word", " Word", "(word"; "camelCase" is two
  | [^rUlod]? [Uom]+ [lom]*     # a word in capitals
  | d                           # every digit alone
  | _? [mp/]+ [r/]*             # a run of signs with the space before and the line ends after
  | [s_r]* r+                   # blank lines
  | [s_r]+ (?![^s_r])           # white space, all but the last, which goes with the next word
  | [s_r]+                      # white space
""", re.VERBOSE)}  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    ids: dict[bytes, int]  # of the tokens that text is made of
    specials: dict[str, int]  # of the tokens that are found whole, before the text is cut
    ranks: dict[tuple[bytes, bytes], int]  # of the merges: which two tokens, in order of importance
    cuts: re.Pattern
    before: tuple[int, ...] = ()  # what the file puts around every text, such as `<s>`
    after: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if self.specials else [text]
        middle = [id for part in parts for id in ([self.specials[part]] if part in self.specials else self.spell(part))]
        return [*self.before, *middle, *self.after]

    def spell(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        kinds = "".join(map(kind, text))  # as long as the text, so a cut in one is a cut in the other
        pieces = (text[cut.start() : cut.end()].encode() for cut in self.cuts.finditer(kinds))
        return [self.ids[token] for piece in pieces for token in self.merge(piece)]

    def merge(self, piece: bytes) -> list[bytes]:
        tokens = [bytes([byte]) for byte in piece]
        while True:
            pairs = zip(tokens, tokens[1:], strict=False)
            rank, at = min(((self.ranks[pair], at) for at, pair in enumerate(pairs) if pair in self.ranks), default=(0, None))
            if at is None:
                return tokens
            tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 (a character cut in two, say) become U+FFFD."""
        token = {i: token for token, i in self.ids.items()} | {i: text.encode() for text, i in self.specials.items()}
        return b"".join(token[i] for i in ids).decode(errors="replace")


def from_json(file: dict) -> Tokenizer:
    """Read a Hugging Face `tokenizer.json`. It spells bytes as characters that print; we undo that here, once."""
    ...

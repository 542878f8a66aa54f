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
from functools import cached_property

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
        """Bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return b"".join(map(self.tokens.__getitem__, ids)).decode(errors="replace")

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        return {i: token for token, i in self.ids.items()} | {i: text.encode() for text, i in self.specials.items()}


def from_json(file: dict) -> Tokenizer:
    """Read a Hugging Face `tokenizer.json`, of the one kind that this chapter explains."""
    match file:
        case {
            "normalizer": None,
            "pre_tokenizer": {"pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ]},
            "model": {"type": "BPE", "ignore_merges": False, "byte_fallback": False, "vocab": vocab, "merges": merges},
        }:  # fmt: skip
            if pattern not in CUTS:
                raise InputError(f"the tokenizer cuts text by a pattern that the specification does not know: {pattern}")
            specials = {token["content"]: token["id"] for token in file["added_tokens"]}
            ids = {as_bytes(token): i for token, i in vocab.items() if token not in specials}
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
            ranks = {(as_bytes(left), as_bytes(right)): rank for rank, (left, right) in enumerate(pairs)}
            return Tokenizer(ids, specials, ranks, CUTS[pattern], *around(file["post_processor"]))
    raise InputError("the specification reads only byte-level BPE tokenizers with a split pattern and no normalizer")


def around(post_processor: dict | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the file puts before and after every text: its template is, say, `<s> A`."""
    match post_processor:
        case {"type": "TemplateProcessing", "single": template, "special_tokens": known}:
            slots = [known[slot["SpecialToken"]["id"]]["ids"] if "SpecialToken" in slot else "A" for slot in template]
            text = slots.index("A")
            return tuple(sum(slots[:text], [])), tuple(sum(slots[text + 1 :], []))
        case _:
            return (), ()


# PRINTABLE BYTES. The file is text, so each byte of a token is written as a character: itself where it prints,
# otherwise the next character from U+0100 on. So " you" is written "Ġyou".
PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(0x100) if byte not in PRINTS]
BYTE_OF = {chr(byte): byte for byte in PRINTS} | {chr(0x100 + n): byte for n, byte in enumerate(HIDDEN)}


def as_bytes(token: str) -> bytes:
    return bytes(map(BYTE_OF.__getitem__, token))

"""Rebuild the 131,072-token vocabulary of Nemotron 3 as a Hugging Face `tokenizer.json`.

    python -m tools.write.tekken_tokenizer OUT_DIRECTORY

The vocabulary descends from Mistral's tekken, whose tokens `mistral-common` ships as byte strings in order of
rank. Nemotron 3 keeps ids 0-999 for special tokens and gives the text token of rank `r` the id `1000 + r`.

Hugging Face's format has merges (pairs) instead of ranks. A token's merge is found by encoding the token's
own bytes until two pieces are left: they are the pair that makes it.
"""

from __future__ import annotations

import base64
import importlib.resources
import json
import sys
from itertools import pairwise
from pathlib import Path

VOCAB_SIZE, RESERVED = 131072, 1000
NAMED_SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]


def tokenizer_json() -> dict:
    """Return the tokenizer file as a dictionary: tekken's cuts, byte-level BPE, special tokens first."""
    data = importlib.resources.files("mistral_common") / "data" / "tekken_240718.json"
    tekken = json.loads(data.read_text(encoding="utf-8"))
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"][: VOCAB_SIZE - RESERVED]]
    specials = NAMED_SPECIALS + [f"<SPECIAL_{i}>" for i in range(len(NAMED_SPECIALS), RESERVED)]
    vocab = {special: i for i, special in enumerate(specials)}
    vocab |= {printable(token): RESERVED + rank for rank, token in enumerate(tokens)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pattern = {"Regex": tekken["config"]["pattern"]}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": special, **plain} for i, special in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[printable(left), printable(right)] for left, right in merges(tokens)],
        },
    }


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the pair that makes each token, in order of rank; the 256 single bytes need none."""
    rank = {token: r for r, token in enumerate(tokens)}
    return [last_two_pieces(token, rank) for token in tokens if len(token) > 1]


def last_two_pieces(token: bytes, rank: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Join the neighbours of lowest rank, again and again, until only the join that makes `token` is left."""
    pieces = [bytes([byte]) for byte in token]
    while len(pieces) > 2:
        joined = [rank.get(left + right, len(rank)) for left, right in pairwise(pieces)]
        at = joined.index(min(joined))
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces[0], pieces[1]


def printable(token: bytes) -> str:
    """Return the character of each byte: itself if it prints, else one from U+0100 on, in order."""
    return "".join(map(PRINTABLE.__getitem__, token))


PRINTS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in PRINTS]
PRINTABLE = {byte: chr(byte) for byte in PRINTS} | {byte: chr(0x100 + n) for n, byte in enumerate(HIDDEN)}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer_json(), ensure_ascii=False))
    print(f"wrote {out / 'tokenizer.json'}")

"""The tokenizer at run time: Hugging Face `tokenizers` does the work; this module loads it and streams text.

The function that it computes is spec/tokenizer.py; a test holds the two equal. Text can be taken token by
token, in whole characters (`Stream`); `stop_strings` finds the strings that end it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import tokenizers

from refengine.checkpoint.generation_config import advice_file, generation_config
from refengine.spec.config import Config, InputError
from refengine.spec.sample import Sampling
from refengine.spec.tokenizer import BYTE_OF
from refengine.untrusted import MAX_JSON, read_json, shown, size_of, unreadable


@dataclass
class Tokenizer:
    """Turns text into token ids and back; holds a checkpoint's end tokens and recommended sampling."""

    hf: tokenizers.Tokenizer
    stop_ids: frozenset[int] = frozenset()  # any of them ends a text
    generation: dict = field(default_factory=dict)  # its advice on sampling: {"top_p": 0.95, ...}
    vocab_size: int | None = None  # of the model: it has no rows for ids from here on

    @classmethod
    def load(cls, directory: Path | str, config: Config | None = None) -> Tokenizer:
        """Return the tokenizer of a checkpoint, from tokenizer.json and the files that name end tokens.

        Ids beyond the vocabulary of `config` are refused when a text uses them: files of fine-tuned models
        name tokens that the model was never given.
        """
        directory = Path(directory)
        advice, _ = generation_config(directory)
        if directory.is_file():
            hf = rebuilt_tokenizer(directory)
            stop_ids = eos_ids(advice, directory)
        else:
            hf = open_tokenizer(directory / "tokenizer.json")
            stop_ids = eos_ids(advice, directory) | eos_tokens(directory, hf)
        stop_ids |= set(config.eos_token_id) if config else set()
        vocab_size = config.vocab_size if config else None
        return cls(hf, frozenset(stop_ids), recommended(advice, directory), vocab_size)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text.

        `add_special_tokens` adds what the file adds to every text; a rendered chat has that already.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode at its character {error.start}") from None
        ids = self.hf.encode(text, add_special_tokens=add_special_tokens).ids
        if self.vocab_size is not None and (largest := max(ids, default=0)) >= self.vocab_size:
            what = f"the text has the token {shown(self.token(largest))} with the id {largest}"
            raise InputError(f"{what}, but config.json has a vocabulary of {self.vocab_size}")
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids; bytes that are no character become U+FFFD."""
        return b"".join(self.bytes_of(i, skip_special_tokens) for i in ids).decode(errors="replace")

    def stream(self, *, skip_special_tokens: bool = False) -> Stream:
        """Return a Stream, which turns ids into text one by one."""
        return Stream(self, skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """Return the token with an id, as the file spells it; None where there is none."""
        return self.hf.id_to_token(token_id) if 0 <= token_id < 2**32 else None  # the library takes no others

    def bytes_of(self, token_id: int, skip_special_tokens: bool = False) -> bytes:
        """Return the bytes that a token adds to a text; none for an unknown token."""
        if skip_special_tokens and token_id in self.specials:
            return b""
        if token_id not in self.known:
            token = self.token(token_id) or ""
            self.known[token_id] = b"".join(BYTES_OF.get(char) or char.encode() for char in token)
        return self.known[token_id]

    @cached_property
    def specials(self) -> frozenset[int]:
        """Return the ids of special tokens."""
        return frozenset(i for i, token in self.hf.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def known(self) -> dict[int, bytes]:
        """Return the bytes of tokens by id: of the added ones; `bytes_of` adds others when it meets them."""
        return {i: token.content.encode() for i, token in self.hf.get_added_tokens_decoder().items()}


BYTES_OF = {char: bytes([byte]) for char, byte in BYTE_OF.items()}


class Stream:
    """Turns tokens into text as soon as its characters are whole; all pieces give the text of `decode`."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that one more token completes."""
        return self.utf8.decode(self.tokenizer.bytes_of(token_id, self.skip_special_tokens))

    def flush(self) -> str:
        """Return what is left when no token follows: U+FFFD for a character that was never finished."""
        return self.utf8.decode(b"", final=True)


def open_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer in a tokenizer.json; InputError if it cannot be read or is not byte-level."""
    if size_of(path) > MAX_JSON:
        raise InputError(f"{path} is far larger than a tokenizer: is it another file?")
    try:
        hf = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{path} is not a tokenizer that can be read: {shown(str(error))}") from None
    kinds = decoder_kinds(json.loads(hf.decoder.__getstate__())) if hf.decoder else []
    if kinds.count("ByteLevel") != 1 or set(kinds) - {"ByteLevel", "Fuse"}:
        also = f" (its decoders are {', '.join(kinds)})" if kinds else ""
        raise InputError(f"{path} is not a byte-level tokenizer, as all models of the family have{also}")
    hf.no_truncation()  # a file may ask for either; here a prompt is what it is
    hf.no_padding()
    return hf


def rebuilt_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer in a GGUF file; InputError if it has none or it cannot be rebuilt."""
    from refengine.checkpoint.gguf import metadata
    from refengine.checkpoint.gguf.texts import tokenizer_json

    if (text := tokenizer_json(path, metadata(path))) is None:
        raise InputError(f"{path} has no tokenizer")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"the tokenizer in {path} cannot be rebuilt: {shown(str(error))}") from None


def decoder_kinds(decoder: dict) -> list[str]:
    """Return the kinds of a decoder and of all that it is a sequence of."""
    if decoder["type"] != "Sequence":
        return [decoder["type"]]
    return [kind for part in decoder["decoders"] for kind in decoder_kinds(part)]


def optional_json(path: Path) -> dict:
    """Return the object in a JSON file; an empty one if there is no such file."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def eos_ids(advice: dict, directory: Path) -> set[int]:
    """Return the end tokens of generation_config.json: one id or several."""
    ids = advice.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if any(type(i) is not int for i in ids):
        what = "eos_token_id has to be an id or a list of ids"
        raise InputError(f"{advice_file(directory)}: {what}")
    return set(ids)


def eos_tokens(directory: Path, hf: tokenizers.Tokenizer) -> set[int]:
    """Return the ids of end tokens that the tokenizer's own settings name by their text."""
    files = [optional_json(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    tokens = [file.get("eos_token") for file in files]
    names = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    ids = [id_of(hf, name) for name in names if isinstance(name, str)]
    return {i for i in ids if i is not None}


def id_of(hf: tokenizers.Tokenizer, token: str) -> int | None:
    """Return the id of a token; None where there is none, as for a text that is not valid Unicode."""
    try:
        return hf.token_to_id(token)
    except UnicodeEncodeError:
        return None


def recommended(advice: dict, directory: Path) -> dict:
    """Return the sampling options of generation_config.json, checked."""
    path = advice_file(directory)
    options = {name: advice[name] for name in Sampling.__dataclass_fields__ if advice.get(name) is not None}
    if type(options.get("top_k", 0)) is not int:
        raise InputError(f"{path}: top_k = {shown(options['top_k'])} is not a whole number")
    if wrong := [name for name, value in options.items() if type(value) not in (int, float)]:
        raise InputError(f"{path}: {wrong[0]} = {shown(options[wrong[0]])} is not a number")
    if advice.get("do_sample") is False:
        options["temperature"] = 0
    try:
        Sampling(**options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return options

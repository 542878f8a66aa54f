"""Serve a checkpoint without a tokenizer: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from refengine.checkpoint.generation_config import generation_config
from refengine.spec.config import Config, InputError
from refengine.text.tokenizer import Stream, Tokenizer, eos_ids, recommended


class NoText(Stream):
    """Takes tokens like a Stream and gives no text."""

    def __init__(self):
        pass

    def push(self, token_id: int) -> str:
        """Return no text."""
        return ""

    def flush(self) -> str:
        """Return no text."""
        return ""


class IdsOnly(Tokenizer):
    """Serves generation in place of a tokenizer, for token ids.

    lacks: a sentence about what is not there, and `remedy` one on where to take it from.
    """

    def __init__(self, directory: Path, config: Config):
        if directory.is_file():
            self.lacks, self.remedy = f"{directory} has no tokenizer", "choose a file that has one"
        else:
            self.lacks = f"{directory / 'tokenizer.json'} does not exist"
            self.remedy = "copy the tokenizer.json of the model that this one was made from"
        advice = generation_config(directory)[0]
        self.stop_ids = frozenset(eos_ids(advice, directory) | set(config.eos_token_id))
        self.generation, self.vocab_size = recommended(advice, directory), config.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raise InputError: text needs a tokenizer."""
        raise InputError(f'{self.lacks}: give token ids (generate --ids "10 25 99"), or {self.remedy}')

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the ids with spaces between them."""
        return " ".join(map(str, ids))

    def stream(self, *, skip_special_tokens: bool = False) -> NoText:
        """Return a stream that gives no text."""
        return NoText()


def tokenizer_of(directory: Path, config: Config) -> Tokenizer:
    """Return the tokenizer of a checkpoint, or IdsOnly where it has no tokenizer.json."""
    if directory.is_file():
        from refengine.checkpoint.gguf import metadata
        from refengine.checkpoint.gguf.texts import has_tokenizer

        known = has_tokenizer(metadata(directory))
        return Tokenizer.load(directory, config) if known else IdsOnly(directory, config)
    path = directory / "tokenizer.json"
    if path.exists() or path.is_symlink():  # a link to nothing is an error, not a model without one
        return Tokenizer.load(directory, config)
    return IdsOnly(directory, config)

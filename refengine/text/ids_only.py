"""In place of a tokenizer that a checkpoint does not have: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from refengine.spec.config import Config, InputError


class NoText:
    """A stream of tokens that gives no text."""

    def push(self, token_id: int) -> str:
        """Return no text."""
        return ""

    def flush(self) -> str:
        """Return no text."""
        return ""


@dataclass
class IdsOnly:
    """Serve generation in place of a tokenizer, for token ids."""

    stop_ids: frozenset[int] = frozenset()
    generation: dict = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path, config: Config) -> IdsOnly:
        """Return it with the end tokens of the config."""
        return cls(frozenset(config.eos_token_id))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raise InputError: text needs a tokenizer."""
        raise InputError('the model has no tokenizer: give token ids (--ids "10 25 99")')

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the ids with spaces between them."""
        return " ".join(map(str, ids))

    def stream(self, *, skip_special_tokens: bool = False) -> NoText:
        """Return a stream that gives no text."""
        return NoText()

"""Two vocabularies for tokenizer tests: the embedded model's, and the released one of 131,072 tokens."""

import functools
import json
from pathlib import Path

import pytest
import tokenizers

from refengine.spec.tokenizer import from_json
from refengine.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "refengine" / "models" / "tiny"
NAMES = ("tiny", "real")


@functools.cache
def file(name: str) -> str:
    """Return the text of tokenizer.json."""
    if name == "tiny":
        return (TINY / "tokenizer.json").read_text(encoding="utf-8")
    pytest.importorskip("mistral_common", reason="the real vocabulary is rebuilt from mistral-common")
    from tools.write.tekken_tokenizer import tokenizer_json

    return json.dumps(tokenizer_json())


@functools.cache
def spec_of(name: str):
    """Return the tokenizer of the specification."""
    return from_json(json.loads(file(name)))


@functools.cache
def engine_of(name: str) -> Tokenizer:
    """Return the tokenizer of the engine."""
    return Tokenizer(tokenizers.Tokenizer.from_str(file(name)))

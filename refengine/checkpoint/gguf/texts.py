"""The metadata of a GGUF file -> its tokenizer, chat templates, end tokens and recommended sampling.

The tokenizer is rebuilt for Hugging Face `tokenizers`: byte-level BPE with the cuts of tekken, which all
models of the family have. Files name it "tekken" or "pixtral": the converter's guess.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from refengine.spec.config import InputError
from refengine.spec.tokenizer import TEKKEN
from refengine.untrusted import shown

KEY = "tokenizer.ggml."
CUTS = {"tekken": TEKKEN, "pixtral": TEKKEN}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ENDS = ("<|im_end|>", "</s>")  # special tokens that always end a text: files name only one of them
NAMES = ("bos", "eos", "unknown", "padding")  # KEY NAME _token_id
SAMPLING = {  # of generation_config.json -> general.sampling.
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def tokenizer_json(path: Path, values: dict[str, Any]) -> str | None:
    """Return tokenizer.json, or None for a file without a tokenizer; InputError if it cannot be rebuilt."""
    if not has_tokenizer(values):
        return None
    model, cuts = (values.get(f"{KEY}{name}") for name in ("model", "pre"))
    if not (isinstance(model, str) and model == "gpt2" and isinstance(cuts, str) and cuts in CUTS):
        what = f"its model is {shown(model)} and its cuts are {shown(cuts)}"
        raise _cannot(path, f"{what}; known is gpt2 with {' or '.join(CUTS)}")
    tokens, merges = _strings(path, values, "tokens"), _strings(path, values, "merges")
    kinds = _kinds(path, values, len(tokens))
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    if len(vocab) != int((kinds != UNUSED).sum()):
        raise _cannot(path, "two tokens have the same text")
    pairs = [merge.split(" ") for merge in merges]
    if wrong := next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None):
        raise _cannot(path, f"the merge {shown(wrong)} is not a pair")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": int(i), "content": tokens[i], "special": bool(kinds[i] != USER_DEFINED)} | plain
        for i in np.flatnonzero(np.isin(kinds, (CONTROL, UNKNOWN, USER_DEFINED)))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": CUTS[cuts]}, "behavior": "Isolated", "invert": False}
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocab, "merges": pairs,
    }  # fmt: skip
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": _frame(path, values, tokens), "decoder": byte_level, "model": bpe,
    })  # fmt: skip


def has_tokenizer(values: dict[str, Any]) -> bool:
    """Return whether a file has a tokenizer."""
    model = values.get(f"{KEY}model", "none")
    return not isinstance(model, str) or model not in ("none", "no_vocab")


def _cannot(path: Path, what: str) -> InputError:
    return InputError(f"the tokenizer in {path} cannot be rebuilt: {what}")


def _strings(path: Path, values: dict[str, Any], name: str) -> list[str]:
    """Return a list of texts."""
    found = values.get(f"{KEY}{name}")
    if not isinstance(found, list) or not found:
        raise _cannot(path, f"{KEY}{name} is not a list of texts")
    try:
        return [each.decode() for each in found]
    except UnicodeDecodeError:
        raise _cannot(path, f"{KEY}{name} holds a text that is not UTF-8") from None


def _kinds(path: Path, values: dict[str, Any], count: int) -> np.ndarray:
    """Return the kind of each token."""
    kinds = values.get(f"{KEY}token_type")
    if kinds is None:
        return np.full(count, NORMAL)
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != count:
        raise _cannot(path, f"{KEY}token_type is not a list of {count} kinds")
    return kinds


def _frame(path: Path, values: dict[str, Any], tokens: list[str]) -> dict | None:
    """Return the post-processor: tokens before and after each text, where the file declares them."""
    parts: list[dict] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for name, at in (("bos", 0), ("eos", 2)):
        if values.get(f"{KEY}add_{name}_token") is not True:
            continue
        token = _id(values, name)
        if token is None or not 0 <= token < len(tokens):
            raise _cannot(path, f"{KEY}add_{name}_token asks for a token that is not there")
        parts.insert(at, {"SpecialToken": {"id": tokens[token], "type_id": 0}})
        special[tokens[token]] = {"id": tokens[token], "ids": [token], "tokens": [tokens[token]]}
    if not special:
        return None
    pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": special}


def _id(values: dict[str, Any], name: str) -> int | None:
    """Return the id of a token that a key names, or None."""
    found = values.get(f"{KEY}{name}_token_id")
    return found if type(found) is int else None


def end_ids(values: dict[str, Any]) -> list[int]:
    """Return the ids of the tokens that end a text: those that the file names, and those among ENDS."""
    found = {_id(values, name) for name in ("eos", "eot", "eom")} - {None}
    tokens, kinds = values.get(f"{KEY}tokens"), values.get(f"{KEY}token_type")
    if isinstance(tokens, list) and isinstance(kinds, np.ndarray) and len(kinds) == len(tokens):
        special = np.flatnonzero(kinds == CONTROL)
        found |= {int(i) for i in special if tokens[i] in {end.encode() for end in ENDS}}
    return sorted(i for i in found if i is not None)


def shortest(value: float) -> float:
    """Return the number of fewest digits that is the same in float32: 1e-05, not 9.99999975e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


def generation_json(values: dict[str, Any]) -> dict[str, Any]:
    """Return what generation_config.json would hold."""
    found = {ours: values.get(f"general.sampling.{name}") for ours, name in SAMPLING.items()}
    advice = {ours: shortest(v) if type(v) is float else v for ours, v in found.items() if v is not None}
    return {"eos_token_id": end_ids(values)} | advice


def templates(path: Path, values: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the chat templates by name, and the special tokens that they may print."""
    prefix = "tokenizer.chat_template"
    sources = {key.removeprefix(f"{prefix}."): values[key] for key in values if key.startswith(f"{prefix}.")}
    if prefix in values:
        sources["default"] = values[prefix]
    if wrong := [name for name, source in sources.items() if not isinstance(source, str)]:
        raise InputError(f"{path}: the chat template {shown(wrong[0])} is not a text")
    listed = values.get(f"{KEY}tokens")
    tokens = listed if isinstance(listed, list) else []
    named = {}
    for name, ours in zip(NAMES, ("bos", "eos", "unk", "pad"), strict=True):
        token = _id(values, name)
        if token is not None and 0 <= token < len(tokens):
            named[f"{ours}_token"] = tokens[token].decode(errors="replace")
    return sources, named

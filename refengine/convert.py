"""Converting a model to a GGUF file: its weights, configuration, tokenizer, templates and advice on sampling.

What the file holds is read again by refengine.checkpoint.gguf, and by llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.generation_config import generation_config
from refengine.checkpoint.gguf import texts, write
from refengine.spec.config import InputError
from refengine.spec.tokenizer import TEKKEN
from refengine.text.chat_template import ChatTemplate
from refengine.text.ids_only import IdsOnly, tokenizer_of
from refengine.text.tokenizer import Tokenizer, id_of
from refengine.untrusted import shown

KINDS = tuple(write.FILE_TYPES)


def convert(
    model: str | Path,
    out: str | Path,
    kind: str = "bf16",
    advance: Callable[[int], object] = lambda elements: None,
) -> dict[str, int]:
    """Write a model as the GGUF file `out`; return the bytes of its tensors by type.

    kind     one of KINDS
    advance  is called with the number of elements that were written

    Raises InputError.
    """
    out = Path(out)
    if kind not in KINDS:
        raise InputError(f"there is no type {kind!r}: give one of {', '.join(KINDS)}")
    if find_spec("gguf") is None:
        raise InputError("converting needs the package gguf: pip install 'refengine[gguf]'")
    if out.suffix != ".gguf":
        raise InputError(f"{out} has to end in .gguf")
    if out.exists():
        raise InputError(f"{out} exists: give a new name")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is not a directory")
    with Checkpoint.open(model) as source:
        more = metadata(source)
        return write.write_gguf(out, source.config, source.read, kind, more, advance)


def metadata(source: Checkpoint) -> dict[str, Any]:
    """Return the keys of a file that are no sizes: name, tokenizer, templates, advice on sampling."""
    directory = source.directory
    advice = generation_config(directory)[0]
    found: dict[str, Any] = {
        "general.name": directory.stem if directory.is_file() else directory.resolve().name
    }
    for ours, name in texts.SAMPLING.items():
        if type(advice.get(ours)) in (int, float):
            found[f"general.sampling.{name}"] = advice[ours] if ours == "top_k" else float(advice[ours])
    tokenizer = tokenizer_of(directory, source.config)
    if isinstance(tokenizer, IdsOnly):
        return found | {"tokenizer.ggml.model": "none"}
    templates = ChatTemplate.load(directory)
    for name, text in templates.sources.items():
        found["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
    return found | tokens(tokenizer, source, templates.tokens)


def tokens(tokenizer: Tokenizer, source: Checkpoint, named: dict[str, str]) -> dict[str, Any]:
    """Return the keys of a tokenizer; InputError for one that llama.cpp would not read as it is."""
    file = json.loads(tokenizer.hf.to_str())
    cuts = json.dumps(file["pre_tokenizer"])
    if file["model"]["type"] != "BPE" or json.dumps(TEKKEN) not in cuts or file["normalizer"]:
        raise InputError(
            f"GGUF has no name for the tokenizer of {source.directory}, which splits by {cuts[:80]}"
        )
    rows = source.config.vocab_size
    vocab = {i: token for token, i in file["model"]["vocab"].items()}
    listed = [vocab.get(i, f"[PAD{i}]") for i in range(rows)]
    kinds = [texts.NORMAL if i in vocab else texts.UNUSED for i in range(rows)]
    for token in file["added_tokens"]:
        if (i := token["id"]) < rows:
            listed[i] = token["content"]
            kinds[i] = texts.CONTROL if token["special"] else texts.USER_DEFINED
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in file["model"]["merges"]]
    found: dict[str, Any] = {
        "model": "gpt2", "pre": "tekken", "tokens": listed, "token_type": kinds, "merges": merges,
        "add_bos_token": _added(tokenizer, source.config.bos_token_id, 0),
        "add_eos_token": False, "add_space_prefix": False,
    }  # fmt: skip
    ids = {name: id_of(tokenizer.hf, text) for name, text in named.items()}
    ends = sorted(i for i in tokenizer.stop_ids if 0 <= i < rows)
    end = ids.get("eos_token")
    end = end if end in ends else next(iter(ends), None)
    other = next((i for i in ends if i != end), None)
    bos = ids.get("bos_token", source.config.bos_token_id)
    pad = ids.get("pad_token", source.config.pad_token_id)
    keys = {"bos": bos, "eos": end, "eot": other, "unknown": ids.get("unk_token"), "padding": pad}
    found |= {f"{name}_token_id": i for name, i in keys.items() if i is not None and 0 <= i < rows}
    return {f"{texts.KEY}{name}": value for name, value in found.items()}


def _added(tokenizer: Tokenizer, token: int | None, at: int) -> bool:
    """Return whether the tokenizer adds a token to every text."""
    ids = tokenizer.hf.encode("a", add_special_tokens=True).ids
    plain = tokenizer.hf.encode("a", add_special_tokens=False).ids
    if ids == plain:
        return False
    if ids != [token, *plain]:
        raise InputError(f"GGUF cannot describe a tokenizer that encodes {shown(plain)} as {shown(ids)}")
    return True

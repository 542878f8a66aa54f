"""A model in one GGUF file, or in several that are called NAME-00001-of-00003.gguf, NAME-00002-of-..."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from refengine.checkpoint.gguf.config import config_of
from refengine.checkpoint.gguf.file import GgufFile
from refengine.checkpoint.gguf.names import by_our_names
from refengine.spec.config import InputError
from refengine.untrusted import shown, unreadable

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def open_parts(path: Path) -> tuple[dict[str, Any], tuple[GgufFile, ...], dict[str, Any]]:
    """Return config.json, the files, and the tensors by their names in the table."""
    first = GgufFile(path)
    files = (first, *(GgufFile(other) for other in others(path, first.metadata)))
    tensors: dict[str, Any] = {}
    for file in files:
        if twice := next((name for name in file.tensors if name in tensors), None):
            raise InputError(
                f"{file.path} holds {shown(twice)}, which {tensors[twice].file.path.name} has too"
            )
        tensors |= file.tensors
    promised = first.metadata.get("split.tensors.count")
    if len(files) > 1 and type(promised) is int and promised != len(tensors):
        raise InputError(
            f"{path} and its parts hold {len(tensors)} tensors, not {promised}: download them again"
        )
    hf = config_of(path, first.metadata, {name: at.shape for name, at in tensors.items()})
    trunk = len(hf["hybrid_override_pattern"])
    return hf, files, by_our_names(tensors, trunk, hf.get("head_dim", 0))


def others(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """Return the other parts of a model, by the path of its first; InputError names one that is missing."""
    count, number = metadata.get("split.count", 0), metadata.get("split.no", 0)
    if type(count) is not int or type(number) is not int:
        raise InputError(f"{path} is damaged: split.count = {shown(count)} is no number of parts")
    if count < 2:
        return []
    found = PART.fullmatch(path.name)
    if not found or int(found[3]) != count or int(found[2]) != number + 1:
        what = f"is part {number + 1} of {count} of a model, and has to be called so"
        raise InputError(f"{path} {what}: NAME-{number + 1:05}-of-{count:05}.gguf")
    names = [f"{found[1]}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    if number:
        raise InputError(f"{path} is part {number + 1} of {count} of a model: give the first, {names[0]}")
    try:
        here = set(os.listdir(path.parent))
    except OSError as error:
        raise unreadable(path.parent, error) from None
    if missing := [name for name in names if name not in here]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path} needs {missing[0]}{more} beside it: download all {count} parts")
    return [path.parent / name for name in names[1:]]


def candidates(names: list[str]) -> list[str]:
    """Return those of a directory's files that are models, or their first parts."""
    models = [name for name in names if name.endswith(".gguf") and not name.startswith("mmproj")]
    parts = {name: PART.fullmatch(name) for name in models}
    return [name for name, part in parts.items() if part is None or int(part[2]) == 1]


def metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file; read once, until the file changes."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return _metadata(path, info.st_mtime_ns, info.st_size)


@lru_cache(maxsize=1)
def _metadata(path: Path, *_) -> dict[str, Any]:
    file = GgufFile(path)
    file.close()
    return file.metadata

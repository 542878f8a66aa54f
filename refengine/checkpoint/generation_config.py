"""The recommended sampling of a checkpoint: generation_config.json, or the metadata of a GGUF file.

A model can do without it.
"""

from __future__ import annotations

from pathlib import Path

from refengine.spec.config import InputError
from refengine.untrusted import read_json

NAME = "generation_config.json"


def advice_file(directory: Path) -> Path:
    """Return the file that sentences name for what `generation_config` returns."""
    return directory if directory.is_file() else directory / NAME


def generation_config(directory: Path) -> tuple[dict, list[str]]:
    """Return what generation_config.json holds, and notes; one that is absent or not JSON holds nothing."""
    if directory.is_file():
        from refengine.checkpoint.gguf import metadata
        from refengine.checkpoint.gguf.texts import generation_json

        return generation_json(metadata(directory)), []
    path = directory / NAME
    if not path.exists():
        return {}, []
    try:
        value = read_json(path)
    except InputError as error:
        return {}, [f"{error}: its end tokens and its advice on sampling are not used"]
    if not isinstance(value, dict):
        return {}, [f"{path} is not a JSON object: its end tokens and its advice on sampling are not used"]
    return value, []

"""Finding the directory of a model, by its path or by its name inside this package."""

from __future__ import annotations

import os
from pathlib import Path

from refengine.checkpoint.hub import NAME, cache_directory, cached, snapshot
from refengine.spec.config import InputError
from refengine.untrusted import unreadable

EMBEDDED = Path(__file__).parent.parent / "models"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def locate(model: str | Path) -> Path:
    """Return the directory of `model`; InputError says why there is none.

    An embedded model goes before a directory of its name, which is `./tiny`; a directory goes before a model
    of its name in the local Hugging Face cache.
    """
    name = os.fspath(model)
    if not name:
        raise InputError("the name of the model is empty")
    embedded = sorted(path.name for path in EMBEDDED.iterdir())
    path = EMBEDDED / name if name in embedded else Path(name)
    if name not in embedded and not path.exists():
        path = cached(name) or path
    try:
        names = sorted(os.listdir(path))
        if "snapshots" in names and "config.json" not in names and (inner := snapshot(path)):
            path, names = inner, sorted(os.listdir(inner))  # a folder of the Hugging Face cache
    except NotADirectoryError:
        raise _not_a_directory(path) from None
    except FileNotFoundError:
        raise _absent(name, embedded) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not any(name.endswith(".safetensors") for name in names):
        raise _no_weights(path, names)
    return path


def _not_a_directory(path: Path) -> InputError:
    if path.suffix == ".gguf":
        return InputError(f"{path} is a GGUF file: not supported yet")
    if path.suffix in PICKLES:
        return _pickle(path)
    return InputError(f"{path} is not a directory: give the one with config.json and *.safetensors files")


def _absent(name: str, embedded: list[str]) -> InputError:
    if NAME.fullmatch(name):
        how = f"'hf download {name}', then give {name} again"
        where = f"there is no directory {name}, and no model of this name in {cache_directory()}"
        return InputError(f"{where}; if it is on the Hugging Face hub, {how}")
    known = ", ".join(embedded)
    return InputError(f"there is no model {name!r}: give a directory or an embedded model ({known})")


def _no_weights(path: Path, names: list[str]) -> InputError:
    for name in names:
        if name.endswith(".gguf"):
            return InputError(f"{path} holds a model in GGUF files: not supported yet")
        if name.endswith(PICKLES):
            return _pickle(path / name)
    if "config.json" in names:
        return InputError(f"{path} has a config.json but no *.safetensors files: download them too")
    return InputError(f"{path} is not a model: it has neither config.json nor *.safetensors files")


def _pickle(path: Path) -> InputError:
    return InputError(f"{path} may be a pickle, which could run any code: convert it to safetensors")

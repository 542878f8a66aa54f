"""Find the directory or the GGUF file of a model, by its path or by its name inside this package."""

from __future__ import annotations

import os
from pathlib import Path

from refengine.checkpoint.hub import NAME, cache_directory, cached, revisions, snapshot
from refengine.spec.config import InputError
from refengine.untrusted import unreadable

EMBEDDED = Path(__file__).parent.parent / "models"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def embedded() -> list[str]:
    """Return the names of the models inside this package."""
    return sorted(path.name for path in EMBEDDED.iterdir())


def locate(model: str | Path, weights: bool = True) -> Path:
    """Return the directory of `model`, or its GGUF file; InputError names the reason if there is none.

    An embedded model goes before a directory of its name, which is `./tiny`; a directory goes before a model
    of its name in the local Hugging Face cache. Without `weights` a directory that has only a config.json
    will do, and so will that file itself.
    """
    name = os.fspath(model)
    if not name:
        raise InputError("the name of the model is empty")
    inside = name in embedded()
    path = EMBEDDED / name if inside else Path(name)
    if not inside and not path.exists():
        path = cached(name) or path
    try:
        names = sorted(os.listdir(path))
        if "snapshots" in names and "config.json" not in names and (inner := snapshot(path)):
            path, names = inner, sorted(os.listdir(inner))  # a folder of the Hugging Face cache
    except NotADirectoryError:
        if is_gguf(path) or (not weights and path.suffix == ".json"):
            return path
        raise _not_a_directory(path) from None
    except FileNotFoundError:
        raise _absent(name) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if any(name.endswith(".safetensors") for name in names):
        return path
    from refengine.checkpoint.gguf.parts import candidates

    models = candidates(names)
    if len(models) == 1:
        return path / models[0]
    if not weights and not models and "config.json" in names:
        return path
    raise _no_weights(path, names, models)


def is_gguf(path: Path) -> bool:
    """Return whether a file is called as GGUF files are, or begins as they do (blobs of Ollama)."""
    if path.suffix == ".gguf":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _not_a_directory(path: Path) -> InputError:
    if path.suffix in PICKLES:
        return _pickle(path)
    how = "give the one with config.json and *.safetensors files, or a GGUF file"
    return InputError(f"{path} is not a directory: {how}")


def _absent(name: str) -> InputError:
    if found := NAME.fullmatch(name):
        model, revision = found[1], found[2]
        command = f"hf download {model}" + (f" --revision {revision}" if revision else "")
        how = f"if it is on the Hugging Face hub, '{command}', then give {name} again"
        others = revisions(model)
        if revision and others:
            there = ", ".join(others[:8])
            return InputError(f"the cache has no revision {revision} of {model}, but {there}; {how}")
        where = f"there is no directory {name}, and no model of this name in {cache_directory()}"
        return InputError(f"{where}; {how}")
    known = ", ".join(embedded())
    return InputError(f"there is no model {name!r}: give a directory or an embedded model ({known})")


def _no_weights(path: Path, names: list[str], models: list[str]) -> InputError:
    if models:
        some = ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
        return InputError(f"{path} holds several models in GGUF files ({some}): give one of them")
    for name in names:
        if name.endswith(PICKLES):
            return _pickle(path / name)
    if "config.json" in names:
        more = "download them too ('refengine inspect' tells the sizes without them)"
        return InputError(f"{path} has a config.json but no *.safetensors files: {more}")
    return InputError(f"{path} is not a model: it has neither config.json nor *.safetensors files")


def _pickle(path: Path) -> InputError:
    return InputError(f"{path} may be a pickle, which could run any code: convert it to safetensors")

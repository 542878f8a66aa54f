"""From what the user called a model to its directory: a path, or the name of a model that comes with refengine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from refengine.untrusted import unreadable
from spec.config import InputError

EMBEDDED = Path(__file__).parent / "models"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def locate(model: str | Path) -> Path:
    """The directory of `model`. An embedded name such as `tiny` is that model; a local directory is then `./tiny`."""
    name = os.fspath(model)
    embedded = sorted(path.name for path in EMBEDDED.iterdir())
    path = EMBEDDED / name if name in embedded else Path(name)
    try:
        names = sorted(os.listdir(path))
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
        return InputError(f"{path} is a GGUF file: not supported yet; give the directory of a safetensors model")
    if path.suffix in PICKLES:
        return _pickle(path)
    return InputError(f"{path} is a file: give the directory that holds config.json and the safetensors files")


def _absent(name: str, embedded: list[str]) -> InputError:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        folder = name.split("/")[1]
        return InputError(
            f"there is no directory {name}; if it is a model on the Hugging Face hub, download it first: "
            f"'hf download {name} --local-dir {folder}', then give {folder} as the model"
        )
    known = ", ".join(embedded)
    return InputError(f"there is no model {name!r}: give a directory, or the name of an embedded model ({known})")


def _no_weights(path: Path, names: list[str]) -> InputError:
    for name in names:
        if name.endswith(".gguf"):
            return InputError(f"{path} holds GGUF files: not supported yet; a safetensors model is needed")
        if name.endswith(PICKLES):
            return _pickle(path / name)
    if "config.json" in names:
        return InputError(f"{path} has a config.json but no *.safetensors files: download the weights too")
    return InputError(f"{path} is not a model: it has neither config.json nor *.safetensors files")


def _pickle(path: Path) -> InputError:
    return InputError(f"{path} may be a pickle, which can run any code, so it is not read: convert it to safetensors")

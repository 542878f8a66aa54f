"""A sequence between two tokens, as a value: its next token depends on this and on the model alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refengine.spec.config import Config, InputError
from refengine.spec.sample import Sampling
from refengine.states import file
from refengine.states.arrays import Arrays, check
from refengine.untrusted import parse_json, shown

IDS = "ids"  # the tensor of token ids, beside those of the layers
MOST = 2**64 - 1  # of a number in the state of a generator


@dataclass(frozen=True)
class State:
    """Holds a sequence between two tokens. It never changes, so several sequences may go on from one.

    model: the fingerprint of the model, and `name` the name of its directory. ids: all tokens so far, of
    which the layers have read the first `position`. sampling: options of Sampling, and `seed`. generator: the
    state of the random generator, by the names of NumPy's Philox; None: as seeded. talk: messages and
    switches of a conversation, or an empty dict.
    """

    model: str
    ids: tuple[int, ...]
    position: int
    arrays: Arrays = field(repr=False)
    name: str = ""
    sampling: dict = field(default_factory=dict)
    generator: dict | None = None
    talk: dict = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all that the layers remember."""
        return sum(a.nbytes for a in self.arrays.values())

    def fork(self, seed: int | None = None) -> State:
        """Return a second state of this point; with a seed it draws other tokens."""
        if seed is None:
            return self
        return replace(self, sampling=self.sampling | {"seed": seed}, generator=None)

    def save(self, path: str | Path) -> None:
        """Write the state to a file, which then holds this state or, if it fails, what it held before.

        Raises InputError where the file cannot be written.
        """
        notes = {
            "model": self.model,
            "name": self.name.encode(errors="replace").decode(),
            "position": str(self.position),
            "sampling": json.dumps(self.sampling),
            "generator": json.dumps(self.generator),
            "talk": json.dumps(self.talk),
        }
        file.write(Path(path), self.arrays | {IDS: np.array(self.ids, np.int32)}, notes)

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Return the state in a file; InputError where it is no such file, damaged, or of another version."""
        path = Path(path)
        notes, arrays = file.read(path)
        ids = arrays.pop(IDS, None)
        if ids is None or ids.dtype != np.int32 or ids.ndim != 1 or not len(ids) or ids.min() < 0:
            raise InputError(f"{path} has no list of token ids")
        if missing := [name for name in ("model", "position", "sampling") if name not in notes]:
            raise InputError(f"the header of {path} has no {missing[0]}")
        position, known = notes["position"], len(ids)
        if not (position.isascii() and position.isdigit() and len(position) < 12 and int(position) <= known):
            raise InputError(
                f"{path} is damaged: its position is {shown(position)}, and it has {known} tokens"
            )
        read = {key: parse_json(notes.get(key, "{}").encode(), f"{key} in {path}") for key in JSON}
        sampling, generator, talk = read.values()
        checked_sampling(sampling, path)
        if not isinstance(talk, dict):
            raise InputError(f"{path} has a talk that is not a JSON object")
        return cls(
            notes["model"],
            tuple(ids.tolist()),
            int(position),
            arrays,
            notes.get("name", ""),
            sampling,
            checked_generator(generator, path),
            talk,
        )

    def check(self, model: str, cfg: Config, source: str = "the state") -> None:
        """Raise InputError unless this is a state of the model with that fingerprint and configuration."""
        if self.model != model:
            of = f" ({self.name})" if self.name else ""
            raise InputError(
                f"{source} belongs to another model{of}: its fingerprint is {shown(self.model)}, not {model}"
            )
        if (largest := max(self.ids)) >= cfg.vocab_size:
            what = f"has the token id {largest}, which is not in the vocabulary of {cfg.vocab_size}"
            raise InputError(f"{source} {what}")
        check(cfg, self.arrays, self.position, source)


JSON = ("sampling", "generator", "talk")


def checked_sampling(found: Any, path: Path) -> None:
    """Raise InputError unless this is a dict of sampling options, and perhaps a seed."""
    if not isinstance(found, dict):
        raise InputError(f"{path} has sampling options that are not a JSON object")
    seed = found.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise InputError(f"{path}: seed = {shown(seed)} is not a whole number from 0 on")
    options = {key: value for key, value in found.items() if key != "seed"}
    if unknown := sorted(options.keys() - Sampling.__dataclass_fields__.keys()):
        raise InputError(f"{path} has the unknown sampling option {shown(unknown[0])}")
    if type(options.get("top_k", 0)) is not int:
        raise InputError(f"{path}: top_k = {shown(options['top_k'])} is not a whole number")
    try:
        Sampling(**options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def checked_generator(found: Any, path: Path) -> dict | None:
    """Return the state of a generator; InputError unless it is one of NumPy's Philox, or None."""
    if not found:
        return None
    sizes = {"counter": 4, "key": 2, "buffer": 4, "buffer_pos": 1, "has_uint32": 1, "uinteger": 1}
    limits = {"buffer_pos": 4, "has_uint32": 1, "uinteger": 2**32 - 1}
    if not isinstance(found, dict) or found.keys() != sizes.keys():
        raise InputError(f"{path} has a random generator that is not one of NumPy's Philox")
    for name, size in sizes.items():
        numbers = found[name] if size > 1 else [found[name]]
        if not isinstance(numbers, list) or len(numbers) != size:
            raise InputError(f"{path}: {name} of its random generator does not have {size} numbers")
        if not all(type(n) is int and 0 <= n <= limits.get(name, MOST) for n in numbers):
            raise InputError(f"{path}: {name} of its random generator is out of range")
    return found


def of_generator(generator: np.random.Generator) -> dict:
    """Return the state of a Philox generator as plain numbers."""
    found: Any = generator.bit_generator.state
    plain = {name: found["state"][name].tolist() for name in ("counter", "key")}
    plain["buffer"] = found["buffer"].tolist()
    return plain | {name: int(found[name]) for name in ("buffer_pos", "has_uint32", "uinteger")}


def set_generator(generator: np.random.Generator, plain: dict) -> None:
    """Set a Philox generator to a state of plain numbers."""
    arrays = {name: np.array(plain[name], np.uint64) for name in ("counter", "key", "buffer")}
    numbers = {name: plain[name] for name in ("buffer_pos", "has_uint32", "uinteger")}
    state = {"counter": arrays["counter"], "key": arrays["key"]}
    generator.bit_generator.state = {
        "bit_generator": "Philox",
        "state": state,
        "buffer": arrays["buffer"],
    } | numbers


def of_sampling(sampling: Sampling, seed: int) -> dict:
    """Return sampling options and seed as plain values."""
    return asdict(sampling) | {"seed": seed}


@dataclass(frozen=True)
class Start:
    """Holds where a sequence starts, and at which point its state is to be returned with its End.

    state: the state to continue, or None. resumed: whether its random generator continues too. keep: "end",
    "turn" (after the last end token of the prompt), or "".
    """

    state: State | None = None
    resumed: bool = False
    keep: str = ""

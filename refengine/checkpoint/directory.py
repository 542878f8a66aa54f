"""A checkpoint: a directory in the Hugging Face layout or a GGUF file, checked against the tensor table.

    directory -> config.json -> Config -> table -> where each of its tensors lies in the memory-mapped files

Opening reads headers only, for a model of any size, and succeeds when the files have all tensors of the
table in the right shapes. Nothing is executed from a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from refengine.checkpoint.generation_config import generation_config
from refengine.checkpoint.locate import locate
from refengine.checkpoint.match import (
    by_name,
    has_wrapper,
    match,
    needed,
    settled,
    with_heads,
    without_other_parts,
)
from refengine.checkpoint.packed import (
    KINDS,
    AnyStored,
    StoredPacked,
    Unread,
    check_input_scale,
    contradictions,
    with_packed,
)
from refengine.checkpoint.safetensors_file import MappedFile, SafetensorsFile, without_collection
from refengine.spec.arrays import DTYPES, Weight
from refengine.spec.config import Config, InputError
from refengine.spec.keys import text_model
from refengine.spec.tensors import Tensor
from refengine.untrusted import read_json, shown

INDEX = "model.safetensors.index.json"
AUTO = {"BF16": "bfloat16", "F16": "float16"}  # the dtype in which such weights stay as they are
EDGE = 64 * 2**10  # bytes at either end of a file's data that the digest covers


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Holds an open checkpoint: `stored` locates each tensor, `notes` are sentences for the user.

    directory  its directory, or its GGUF file
    """

    directory: Path
    config: Config
    files: tuple[MappedFile, ...] = field(repr=False)
    stored: Mapping[str, AnyStored | Unread] = field(repr=False)
    notes: tuple[str, ...]

    @classmethod
    @without_collection()
    def open(cls, model: str | Path) -> Checkpoint:
        """Return a model opened by its directory or its embedded name; InputError names the fault."""
        directory = locate(model)
        if directory.is_file():
            return cls._of_gguf(directory)
        notes: list[str] = []
        outer = config_json(directory / "config.json")
        hf = text_model(outer, notes)
        files, index = _files(directory, hf is not outer, notes)
        found = by_name(files, index, notes)
        if hf is not outer or has_wrapper(at.name for at in found.values()):
            found = without_other_parts(found, notes)
        weights = with_packed(found, directory, (outer | hf).get("quantization_config"))
        notes += _quantization(directory, outer | hf, weights)
        cfg = settled(config_of(directory, with_heads(hf, weights, notes), notes), weights, notes)
        stored = match(cfg, weights, directory, sum(file.size for file in files), notes)
        notes += generation_config(directory)[1]
        return cls(directory, cfg, files, stored, tuple(notes))

    @classmethod
    def _of_gguf(cls, path: Path) -> Checkpoint:
        """Return the model in a GGUF file; sentences name its metadata in place of config.json."""
        from refengine.checkpoint.gguf import open_parts

        notes: list[str] = []
        try:
            hf, files, found = open_parts(path)
            cfg = settled(config_of(path, hf, notes), found, notes)
            stored = match(cfg, found, path, sum(file.size for file in files), notes)
        except InputError as error:
            raise InputError(str(error).replace("config.json", "its metadata")) from None
        notes = [note.replace("config.json", "its metadata") for note in notes]
        return cls(path, cfg, files, stored, tuple(notes))

    def read(self, name: str) -> Weight:
        """Return a tensor by its name in the table, in the file's dtype or packed: a view, not a copy."""
        return self.stored[name].array()

    @property
    def packed(self) -> bool:
        """Return whether any weight is packed."""
        return any(at.dtype not in DTYPES for at in self.stored.values())

    def check_packed_inputs(self) -> None:
        """Raise InputError where no weight has a scale for its inputs, or one of the scales is not valid."""
        packed = [at for at in self.stored.values() if isinstance(at, StoredPacked)]
        scales = [at.input_scale for at in packed if at.input_scale is not None]
        if not scales:
            what = "no weight has an input_scale (quantize --calibrate writes them)"
            raise InputError(f"inputs of {self.directory} cannot be packed: {what}")
        for scale in scales:
            check_input_scale(scale)

    def with_packing_note(self, backend: str, packed: bool) -> Checkpoint:
        """Return the same checkpoint, with a note if a backend cannot keep packed weights packed."""
        if packed or not self.packed:
            return self
        note = f"the {backend} backend keeps packed weights as matrices in bfloat16, which are larger"
        return replace(self, notes=(*self.notes, note))

    def bytes_of(self, row: Tensor) -> int:
        """Return the bytes that a row of the table takes on disk."""
        return self.stored[row.name].nbytes

    def in_large_pages(self) -> Checkpoint:
        """Return the same checkpoint, prepared for a process that reads all of it: see SafetensorsFile."""
        for file in self.files:
            file.in_large_pages()
        return self

    def release(self, names: Iterable[str] | None = None) -> None:
        """Give back the memory that reading these tensors (or all) filled; views stay valid and refill it."""
        for name in self.stored if names is None else names:
            self.stored[name].release()

    def auto_dtype(self, backend: str) -> str:
        """Return the dtype that "auto" means for a backend, by its name.

        NumPy computes in float32. The other backends keep weights as the checkpoint stores most of them, and
        choose the dtype of activations by the processor (docs/torch.md).
        """
        sizes: dict[str, int] = {}
        for at in self.stored.values():
            sizes[at.dtype] = sizes.get(at.dtype, 0) + at.nbytes
        most = max(sizes, key=lambda dtype: sizes[dtype], default="F32")
        if backend == "numpy":
            return "float32"
        return AUTO.get(most, "float32") if most in DTYPES else "bfloat16"

    def digest(self) -> str:
        """Return a digest of the configuration, of all headers, and of both ends of all data.

        It changes with the layout of the files; `checkpoint.fingerprint` does not.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
        for file in self.files:
            digest.update(file.header)
            digest.update(file.map[file.start : file.start + EDGE])
            digest.update(file.map[max(file.start, file.size - EDGE) :])
        return digest.hexdigest()

    def close(self) -> None:
        """Unmap the files; arrays that were read stay valid for as long as they are kept."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def config_json(path: Path) -> dict:
    """Return the object in a config.json; InputError if it is none."""
    hf = read_json(path)
    if not isinstance(hf, dict):
        raise InputError(f"{path} is not a JSON object")
    return hf


def config_of(path: Path, hf: dict, notes: list[str]) -> Config:
    """Return the configuration in the object of a config.json; an InputError names the path."""
    try:
        return Config.from_hf(hf, notes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _quantization(directory: Path, hf: dict, found: dict[str, AnyStored]) -> list[str]:
    """Return notes where metadata describes weights in another way than the files hold them."""
    said = {key: hf[key] for key in ("quantization_config", "compression_config") if hf.get(key)}
    if (directory / "hf_quant_config.json").exists():
        with suppress(InputError):  # it is not needed: what it says is decided by the tensors
            said["hf_quant_config.json"] = read_json(directory / "hf_quant_config.json")
    if not said:
        return []
    if any(at.dtype in KINDS for at in found.values()):
        return [note for where, value in said.items() for note in contradictions(value, where, found)]
    where = " and ".join(said)
    settings = [value.get("quantization", value) for value in said.values() if isinstance(value, dict)]
    keys = {key for value in settings if isinstance(value, dict) for key in value if value[key]}
    if keys & {"kv_cache_quant_algo", "kv_cache_scheme"} and not keys & {"quant_algo", "config_groups"}:
        return [f"{where} quantizes only the cache of keys and values: FP8 unless --kv-dtype names another"]
    return [f"{where} describes quantized weights, but no tensor is packed: read as they are"]


def _files(
    directory: Path, wrapper: bool, notes: list[str]
) -> tuple[tuple[SafetensorsFile, ...], dict[str, str]]:
    """Return the files with weights, and the index of their tensors without those that are absent.

    The files are those of the index, else model.safetensors, else all there are.
    """
    names = sorted(os.listdir(directory))
    here = [name for name in names if name.endswith(".safetensors")]
    listed = _index(directory, here, wrapper) if INDEX in names else {}
    wrapper |= has_wrapper(listed)
    index = dict(listed)
    if not set(index.values()) <= set(here):
        index = {tensor: name for tensor, name in listed.items() if name in here}
    chosen = sorted(set(index.values())) or [name for name in here if name == "model.safetensors"] or here
    unread = [name for name in here if name not in chosen]
    if "model.safetensors" in unread:
        raise InputError(
            f"{directory} has model.safetensors and an index that does not list it: remove the outdated one"
        )
    files = {name: SafetensorsFile(directory / name) for name in chosen}
    for tensor, name in list(index.items()):
        if tensor not in files[name].tensors:
            if needed(tensor, wrapper):
                what = f"{directory / INDEX} places {shown(tensor)} in {name}"
                raise InputError(f"{what}, which does not contain it: is the download complete?")
            del index[tensor]
    if absent := [tensor for tensor in listed if tensor not in index]:
        what = f"{shown(absent[0])} and {len(absent) - 1} more" if len(absent) > 1 else shown(absent[0])
        notes.append(f"{INDEX} lists {what}, which the file that it names does not contain: left out")
    notes += [f"{name} is not part of the model: not read" for name in unread]
    return tuple(files.values()), index


def _index(directory: Path, here: list[str], wrapper: bool) -> dict[str, str]:
    """Return {tensor name: file name}. A file is one of the directory's own: no path leads out of it.

    A file that is not there is an error, unless it holds nothing that a model needs.
    """
    index = read_json(directory / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{directory / INDEX} has no weight_map from tensor names to file names")
    wrapper |= has_wrapper(files)
    for name in sorted(set(files.values()) - set(here)):
        if "/" in name or "\\" in name:
            raise InputError(f"{directory / INDEX} names {shown(name)}, a path where only a file name may be")
        if not any(needed(tensor, wrapper) for tensor, file in files.items() if file == name):
            continue
        raise InputError(f"{directory / INDEX} names {shown(name)}, which is not there: download it too")
    return files

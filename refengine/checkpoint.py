"""A checkpoint: a directory in the Hugging Face layout, checked against the tensor table and read tensor by tensor.

    directory -> config.json -> Config -> table -> where each of its tensors lies in the memory-mapped files

Opening reads the headers only, whatever the size of the model. Everything the table asks for is present, with its
shape, in a dtype that can be read, before any of it is computed with; and nothing in the files is left over, so that
no weight is silently ignored, except what HARMLESS names and a prediction head that config.json does not declare.
Nothing is executed from a checkpoint.

A file may spell names in three ways that mean the same: `model.` for `backbone.`; a layer's experts stacked, as
`experts.up_proj` [expert, out, in]; and no `lm_head.weight` (or one equal to the embedding) where the two are tied.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refengine.locate import locate
from refengine.safetensors_file import SafetensorsFile, Stored
from refengine.untrusted import read_json, shown
from spec.arrays import DTYPES
from spec.config import Config, InputError
from spec.tensors import Tensor, table

INDEX = "model.safetensors.index.json"
# Tensors that change nothing: the positions of a rotary embedding that the family does not use (trap 3), and the
# scales of an 8-bit key/value cache, which a cache in float does not need.
HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|k_proj\.k_scale|v_proj\.v_scale)$")
PACKED = re.compile(r"\.(weight_scale|weight_scale_2|input_scale|pre_quant_scale)$")
EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; `stored` says of every name in the table where it lies, `notes` what was left out and why."""

    directory: Path
    config: Config
    files: tuple[SafetensorsFile, ...]
    stored: dict[str, Stored]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a model by its directory or embedded name; InputError says what is wrong with it."""
        directory = locate(model)
        cfg = _config(directory)
        files, notes = _files(directory)
        found = _by_name(files)
        cfg, more = _head_or_none(cfg, found)
        stored, left_out = _matched(directory, cfg, found, sum(file.size for file in files))
        return cls(directory, cfg, files, stored, (*notes, *more, *left_out))

    def read(self, name: str) -> np.ndarray:
        """A tensor by its name in the table, in the file's dtype: a read-only view, nothing is copied."""
        return self.stored[name].array()

    def bytes_of(self, row: Tensor) -> int:
        """Bytes that a row of the table takes on disk."""
        return self.stored[row.name].nbytes

    def release(self, names=None) -> None:
        """Give back the memory that reading these tensors (or all) filled; views stay valid and are read again."""
        for name in self.stored if names is None else names:
            self.stored[name].release()

    def fingerprint(self) -> str:
        """Names this model for saved states: its configuration, all headers, both ends of each file."""
        digest = hashlib.sha256(json.dumps(self.config.to_hf(), sort_keys=True).encode())
        for file in self.files:
            digest.update(file.header + file.map[-(2**16) :])
            start = 8 + len(file.header)
            digest.update(file.map[start : start + 2**16])
        return digest.hexdigest()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _config(directory: Path) -> Config:
    hf = read_json(directory / "config.json")
    if isinstance(hf, dict) and hf.get("quantization_config") or (directory / "hf_quant_config.json").exists():
        raise _quantized(directory)
    try:
        return Config.from_hf(hf)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None


def _files(directory: Path) -> tuple[tuple[SafetensorsFile, ...], list[str]]:
    """The files that hold the weights: those the index names; or model.safetensors; or all there are."""
    here = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
    index = _index(directory, here) if (directory / INDEX).exists() else None
    if index and "model.safetensors" in set(here) - set(index.values()):
        raise InputError(f"{directory} has a model.safetensors and an index of other files: remove the stale one")
    names = sorted(set(index.values())) if index else ["model.safetensors"] if "model.safetensors" in here else here
    files = {name: SafetensorsFile(directory / name) for name in names}
    for tensor, name in (index or {}).items():
        if tensor not in files[name].tensors:
            raise InputError(f"{directory / INDEX} places {shown(tensor)} in {name}, which does not hold it")
    unused = [name for name in here if name not in files]
    return tuple(files.values()), [f"{name} is not part of the model: not read" for name in unused]


def _index(directory: Path, here: list[str]) -> dict[str, str]:
    """Tensor name -> file. A file must be one of the directory's own: no path can lead out of it."""
    index = read_json(directory / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise InputError(f"{directory / INDEX} has no weight_map from tensor names to file names")
    for name in files.values():
        if "/" in name or "\\" in name:
            raise InputError(f"{directory / INDEX} names {shown(name)}: a path, where only a file name may stand")
        if name not in here:
            raise InputError(f"{directory / INDEX} names {shown(name)}, which is not there: download it too")
    return files


def _by_name(files: tuple[SafetensorsFile, ...]) -> dict[str, Stored]:
    """All tensors under the names of the table (stacked experts: `...mixer.experts.up_proj`)."""
    found: dict[str, Stored] = {}
    for file in files:
        for name, at in file.tensors.items():
            if name.startswith("model."):
                name = "backbone." + name.removeprefix("model.")
            if name.endswith((".experts.up_proj.weight", ".experts.down_proj.weight")):
                name = name.removesuffix(".weight")
            if other := found.get(name):
                raise InputError(f"{shown(at.name)} in {file.path} and {shown(other.name)} in {other.file.path.name} "
                                 f"are the same tensor: the model has it twice")  # fmt: skip
            found[name] = at
    return found


def _head_or_none(cfg: Config, found: dict[str, Stored]) -> tuple[Config, list[str]]:
    """A model re-saved by transformers declares a prediction head and has lost all of it: it runs without."""
    mtp = [name for name in found if name.startswith("mtp.")]
    if cfg.mtp_layers and not mtp:
        return replace(cfg, mtp_layers=""), ["config.json declares a prediction head (mtp), the files hold none"]
    if mtp and not cfg.mtp_layers:
        return cfg, [f"a prediction head ({len(mtp)} mtp tensors) that config.json does not declare: not loaded"]
    return cfg, []


def _matched(directory: Path, cfg: Config, found: dict[str, Stored], size: int) -> tuple[dict[str, Stored], list[str]]:
    """Every row of the table with the place of its tensor; all is there, and nothing else is."""
    if _expert_bytes(cfg) > size:  # asked before the table is made, which a lie could make enormous
        raise InputError(f"{directory}: config.json calls for more experts than the {size} bytes of its files can "
                         f"hold: is the download complete?")  # fmt: skip
    used, stored, missing = set(), {}, []
    for row in table(cfg):
        name, at = row.name, found.get(row.name)
        if at is None and (expert := EXPERT.search(name)):
            name = f"{name[: expert.start()]}.experts.{expert[2]}"
            if stack := found.get(name):
                _check(stack, (cfg.n_routed_experts, *row.shape))
                at = stack.part(int(expert[1]))
        if at is None:
            missing.append(name)
            continue
        _check(at, row.shape)
        stored[row.name] = at
        used.add(name)
    left = {name: at for name, at in found.items() if name not in used}
    if any(PACKED.search(name) for name in left):
        raise _quantized(directory)
    if missing:
        raise InputError(f"{directory} lacks the tensor {missing[0]}{_and_more(missing)}: is the download complete?")
    if cfg.tie_word_embeddings and "lm_head.weight" in left:
        _check_tied(left.pop("lm_head.weight"), stored["backbone.embeddings.weight"])
    harmless = [name for name in left if HARMLESS.search(name) or name.startswith("mtp.") and not cfg.mtp_layers]
    unknown = sorted(left.keys() - set(harmless))
    if unknown:
        at = left[unknown[0]]
        raise InputError(f"{at.file.path} holds {shown(at.name)}{_and_more(unknown)}, which a model with this "
                         f"config.json does not have")  # fmt: skip
    ignored = [name for name in harmless if HARMLESS.search(name)]
    return stored, [f"{name} changes nothing: not read" for name in ignored]


def _check(at: Stored, shape: tuple[int, ...]) -> None:
    if at.dtype not in DTYPES:
        if at.dtype in ("U8", "F8_E4M3"):
            raise _quantized(at.file.path.parent)
        raise InputError(f"{shown(at.name)} in {at.file.path} has dtype {at.dtype}; {', '.join(DTYPES)} can be read")
    if at.shape != shape:
        raise InputError(f"{shown(at.name)} in {at.file.path} has shape {shown(list(at.shape))}; config.json calls for "
                         f"{list(shape)}")  # fmt: skip


def _check_tied(head: Stored, embedding: Stored) -> None:
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or any(head.part(i).raw != embedding.part(i).raw for i in range(head.shape[0])):
        raise InputError(f"config.json ties lm_head to the embedding, but {head.file.path} holds an lm_head.weight "
                         f"of its own")  # fmt: skip


def _expert_bytes(cfg: Config) -> int:
    """The least that all routed experts take on disk: two bytes an element."""
    layers = (cfg.layers + cfg.mtp_layers).count("E")
    return 4 * layers * cfg.n_routed_experts * cfg.expert_width * cfg.moe_intermediate_size


def _quantized(directory: Path) -> InputError:
    return InputError(f"{directory} is quantized (FP8, NVFP4 or another packed format): not supported yet")


def _and_more(names: list) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

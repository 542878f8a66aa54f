"""Matching the tensors in the files with the tensor table: all that it lists is there, and nothing else is.

Four differences mean nothing: another spelling of a name (`canonical` in spec/tensors.py); axes of size one;
a layer's experts stacked in one tensor, called `experts.up_proj` [expert, out, in]; no `lm_head.weight`, or
one equal to the embedding, where they are tied. A tensor that the table does not know is refused: a program
that ignores a weight computes another model. Exceptions are HARMLESS ones and a prediction head that
config.json does not declare; they leave a note.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from refengine.checkpoint.safetensors_file import SafetensorsFile, Stored
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config, InputError
from refengine.spec.tensors import PREFIXES, Tensor, canonical, table
from refengine.untrusted import shown

# Frequencies of a rotary embedding, which the family does not use (trap 3), and scales of an 8-bit cache of
# keys and values, which a cache in floating point does not need.
HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|k_proj\.k_scale|v_proj\.v_scale)$")
LAYER = re.compile(r"(.*?)layers\.\d+\.(?:norm|mixer)\.")
PACKED = re.compile(r"\.(weight_scale|weight_scale_2|weight_scale_inv|input_scale|pre_quant_scale)$")
PACKED_DTYPES = {"U8", "I8", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0"}


def by_name(files: Iterable[SafetensorsFile]) -> dict[str, Stored]:
    """Return all tensors of the files, under the names of the table; others under their own names."""
    found: dict[str, Stored] = {}
    for file in files:
        for at in file.tensors.values():
            name = canonical(at.name) or at.name
            if name in found:
                raise _twice(found[name], at)
            found[name] = at
    return found


def without_lost_head(cfg: Config, found: dict[str, Stored]) -> tuple[Config, list[str]]:
    """Return the configuration without a prediction head whose tensors are absent, and notes."""
    head = [name for name in found if name.startswith("mtp.")]
    if cfg.mtp_layers and not head:
        note = "config.json declares a prediction head, but the files hold no mtp tensors: not loaded"
        return replace(cfg, mtp_layers=""), [note]
    if head and not cfg.mtp_layers:
        for name in head:
            del found[name]
        note = f"{len(head)} mtp tensors, of a prediction head that config.json does not declare: not read"
        return cfg, [note]
    return cfg, []


def match(
    cfg: Config, found: dict[str, Stored], directory: Path, size: int
) -> tuple[dict[str, Stored], list[str]]:
    """Return where each tensor of the table lies, and notes on what was ignored; `size`: of all files."""
    if _expert_bytes(cfg) > size:  # before the table, which a false config.json can make enormous
        what = f"config.json calls for more experts than the {size} bytes of its files can hold"
        raise InputError(f"{directory}: {what}; is the download complete?")
    if any(at.dtype in PACKED_DTYPES or PACKED.search(name) for name, at in found.items()):
        raise quantized(directory)
    stored, missing, used = {}, [], set()
    for row in table(cfg):
        name, at = _place(row, found, cfg)
        if at is None:
            missing.append(row.name)
            continue
        stored[row.name] = _checked(at, row.shape)
        used.add(name)
    if missing:
        raise _missing(directory, missing, found)
    left = {name: at for name, at in found.items() if name not in used}
    return stored, _ignored(cfg, left, stored)


def _missing(directory: Path, missing: list[str], found: dict[str, Stored]) -> InputError:
    """Return the error for missing tensors; it names the prefix of those that are there, if it is unknown."""
    what = f"{directory} lacks the tensor {missing[0]}{_and_more(missing)}"
    prefixes = Counter(layer[1] for name in found if not canonical(name) and (layer := LAYER.match(name)))
    if not prefixes:
        return InputError(f"{what}: is the download complete?")
    (prefix, count), *_ = prefixes.most_common(1)
    known = ", ".join(f"{each}." for each in PREFIXES)
    return InputError(f"{what}; {count} tensors have the prefix {shown(prefix)}, which is none of {known}")


def quantized(directory: Path) -> InputError:
    """Return the error for a model with packed weights."""
    return InputError(f"{directory} is quantized (NVFP4, FP8 or another packed format): not supported yet")


def _place(row: Tensor, found: dict[str, Stored], cfg: Config) -> tuple[str, Stored | None]:
    """Return where a row of the table lies, and its name there: an expert may lie in a stack of its layer."""
    at = found.get(row.name)
    if row.role != "routed_expert":
        return row.name, at
    experts, e, matrix, _ = row.name.rsplit(".", 3)
    stack = found.get(f"{experts}.{matrix}")
    if stack is None:
        return row.name, at
    if at is not None:
        raise _twice(stack, at)
    stack = _checked(stack, (cfg.n_routed_experts, *row.shape))
    return f"{experts}.{matrix}", stack.part(int(e))


def _checked(at: Stored, shape: tuple[int, ...]) -> Stored:
    """Return the tensor in this shape, which may differ from the file's in axes of size one."""
    if at.dtype not in DTYPES:
        what = f"{at.dtype}, which is none of {', '.join(DTYPES)}"
        raise InputError(f"{shown(at.name)} in {at.file.path} has the dtype {what}")
    if at.shape == shape:
        return at
    if [size for size in at.shape if size != 1] != [size for size in shape if size != 1]:
        what = f"{shown(list(at.shape))}, where config.json calls for {list(shape)}"
        raise InputError(f"{shown(at.name)} in {at.file.path} has the shape {what}")
    return at._replace(shape=shape)


def _ignored(cfg: Config, left: dict[str, Stored], stored: dict[str, Stored]) -> list[str]:
    """Return notes on tensors that are left over and may be ignored; any other is an error."""
    if cfg.tie_word_embeddings and "lm_head.weight" in left:
        _check_tied(left.pop("lm_head.weight"), stored["backbone.embeddings.weight"])
    harmless = [at.name for name, at in left.items() if HARMLESS.search(name)]
    unknown = [at for name, at in left.items() if not HARMLESS.search(name)]
    if unknown:
        what = f"{shown(unknown[0].name)}{_and_more(unknown)}"
        raise InputError(f"{unknown[0].file.path} holds {what}, which config.json has no use for")
    return [f"{shown(harmless[0])}{_and_more(harmless)} would change nothing: not read"] if harmless else []


def _check_tied(head: Stored, embedding: Stored) -> None:
    """Refuse a head that differs from the embedding it is said to be."""
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or any(head.part(i).raw != embedding.part(i).raw for i in range(head.shape[0])):
        what = f"the lm_head.weight in {head.file.path} is another"
        raise InputError(f"config.json says that the embedding serves as lm_head, but {what}")


def _expert_bytes(cfg: Config) -> int:
    """Return the least that all routed experts take on disk: two matrices each, of two bytes an element."""
    experts = (cfg.layers + cfg.mtp_layers).count("E") * cfg.n_routed_experts
    return experts * 2 * cfg.moe_intermediate_size * cfg.expert_width * 2


def _twice(a: Stored, b: Stored) -> InputError:
    both = f"{shown(a.name)} in {a.file.path} and {shown(b.name)} in {b.file.path.name}"
    return InputError(f"{both} are the same tensor: only one of them can be meant")


def _and_more(names: list) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

"""Match the tensors in the files with the tensor table: every tensor of the table, and no other.

Four differences are accepted: another spelling of a name (`canonical` in names.py); axes of size one;
a layer's experts stacked in one tensor, called `experts.up_proj` [expert, out, in]; no `lm_head.weight`, or
one equal to the embedding, where they are tied. A tensor that is not in the table is refused: a program
that ignores a weight computes another model. Exceptions are HARMLESS ones and a prediction head that
config.json does not declare; they leave a note.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from refengine.checkpoint.names import PREFIXES, canonical
from refengine.checkpoint.packed import KINDS, AnyStored
from refengine.checkpoint.safetensors_file import SafetensorsFile, Stored
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config, InputError
from refengine.spec.keys import names_of
from refengine.spec.tensors import Tensor, table
from refengine.untrusted import shown

# Frequencies of a rotary embedding, which the family does not use (trap 3), and scales of an 8-bit cache of
# keys and values, which a cache in floating point does not need.
HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|k_proj\.k_scale|v_proj\.v_scale|[kv]_proj\.output_scale)$")
HEAD_BEGINS = re.compile(r"mtp\.layers\.(\d{1,4})\.eh_proj\.weight")
HEAD_ENDS = re.compile(r"mtp\.layers\.(\d{1,4})\.final_layernorm\.weight")
MTP_LAYER = re.compile(r"mtp\.layers\.(\d{1,4})\.")
ROWS_OF_HEADS = (".mixer.q_proj.weight", ".mixer.k_proj.weight")
LATENT = re.compile(r"\.mixer\.(fc[12])_latent_proj\.weight$")
EXPERT = re.compile(r"\.mixer\.experts\.(?:\d{1,5}\.)?(up|down)_proj(?:\.weight)?$")
LAYER = re.compile(r"(.*?)layers\.\d+\.(?:norm|mixer)\.")


def needed(name: str, wrapper: bool) -> bool:
    """Return whether a model cannot do without the tensor that an index calls `name`; its head can go.

    Of a wrapper only the text model is needed.
    """
    ours = canonical(name)
    if ours is None:
        return not wrapper
    return not (ours.startswith("mtp.") or HARMLESS.search(ours))


def has_wrapper(names: Iterable[str]) -> bool:
    """Return whether some of the names say that their model is one part of a wrapper."""
    return "language_model." in "\n".join(names)


def without_other_parts(found: dict[str, Stored], notes: list[str]) -> dict[str, Stored]:
    """Return the tensors of the text model alone, with a note of what a wrapper has beside it."""
    ours = {name: at for name, at in found.items() if canonical(name) is not None}
    parts = Counter(name.partition(".")[0] for name in found if name not in ours)
    if parts:
        what = ", ".join(f"{count} of {shown(part)}" for part, count in parts.most_common(8))
        notes.append(f"tensors of other parts than the text model ({what}): not read")
    return ours


def by_name(files: Iterable[SafetensorsFile], index: dict[str, str], notes: list[str]) -> dict[str, Stored]:
    """Return all tensors of the files, under the names of the table; others under their own names.

    Where two files hold the same tensor, the one that the index names counts.
    """
    found: dict[str, Stored] = {}
    stale: list[Stored] = []
    for file in files:
        for at in file.tensors.values():
            name = canonical(at.name) or at.name
            other = found.setdefault(name, at)
            if other is at:
                continue
            named = [each for each in (other, at) if index.get(each.name) == each.file.path.name]
            if len(named) != 1:
                raise _twice(other, at)
            found[name] = named[0]
            stale.append(at if named[0] is other else other)
    if stale:
        what = f"{stale[0].file.path.name} holds another {shown(stale[0].name)}{_and_more(stale)}"
        notes.append(f"{what} than the file that the index names: not read")
    return found


def with_heads(hf: dict, found: dict[str, AnyStored], notes: list[str]) -> dict:
    """Return config.json with the size and number of attention heads that it lacks, from the projections.

    Without them a missing head_dim means hidden_size / num_attention_heads.
    """
    q, k = (next((at for name, at in found.items() if name.endswith(end)), None) for end in ROWS_OF_HEADS)
    heads, size = hf.get("num_attention_heads"), None
    if q is None or k is None or type(heads) is not int or heads <= 0 or not (q.shape and k.shape):
        return hf
    if all(hf.get(name) is None for name in names_of("head_dim")) and q.shape[0] % heads == 0:
        size = q.shape[0] // heads
        if size * heads != hf.get("hidden_size"):
            notes.append(f"config.json lacks head_dim, and q_proj has {q.shape[0]} rows: head_dim = {size}")
            hf = hf | {"head_dim": size}
    if any(hf.get(name) is not None for name in names_of("num_key_value_heads")):
        return hf
    every = any(name in hf for name in names_of("num_key_value_heads"))  # null: as many as query heads
    size = size or next((hf[name] for name in names_of("head_dim") if hf.get(name) is not None), None)
    if type(size) is not int or size <= 0 or k.shape[0] % size or not k.shape[0]:
        return hf
    kv = k.shape[0] // size
    if not (every and kv == heads):
        notes.append(f"config.json lacks num_key_value_heads, and k_proj has {k.shape[0]} rows: {kv} heads")
        hf = hf | {"num_key_value_heads": kv}
    return hf


def settled(cfg: Config, found: dict[str, AnyStored], notes: list[str]) -> Config:
    """Return the configuration with what the tensors in the files say better than config.json, with notes.

    Only what is unambiguous: prediction heads that are there or not, the rows of the embedding and lm_head
    where both agree, key/value heads, and the latent of the experts. InputError names key/value heads that
    have two readings.
    """
    cfg = _settled_head(cfg, found, notes)
    cfg = _settled_vocabulary(cfg, found, notes)
    cfg = _settled_latent(cfg, found, notes)
    return _settled_attention(cfg, found, notes)


def _settled_head(cfg: Config, found: dict[str, AnyStored], notes: list[str]) -> Config:
    """Return the configuration with the prediction head that is there; tensors of others leave `found`."""
    head = [name for name in found if name.startswith("mtp.")]
    if cfg.mtp_layers and not head:
        notes.append("config.json declares a prediction head, but the files hold no mtp tensors: not loaded")
        return replace(cfg, mtp_layers="")
    if head and not cfg.mtp_layers:
        for name in head:
            del found[name]
        what = "of a prediction head that config.json does not declare"
        notes.append(f"{len(head)} mtp tensors, {what}: not read")
        return cfg
    begins = sorted(int(at[1]) for name in head if (at := HEAD_BEGINS.fullmatch(name)))
    ends = sorted(int(at[1]) + 1 for name in head if (at := HEAD_ENDS.fullmatch(name)))
    length = begins[1] if len(begins) > 1 else ends[0] if ends else len(cfg.mtp_layers)
    further = [name for name in head if (at := MTP_LAYER.match(name)) and int(at[1]) >= length]
    if begins[:1] != [0] or length > len(cfg.mtp_layers) or (further and len(begins) < 2):
        return cfg  # no head that can be told from another; the match says what is wrong
    for name in further:
        del found[name]
    if further:
        notes.append(f"{len(further)} mtp tensors, of prediction heads after the first: not read")
    if length == len(cfg.mtp_layers):
        return cfg
    notes.append(f"config.json has {len(cfg.mtp_layers)} layers of prediction heads, the first has {length}")
    return replace(cfg, mtp_layers=cfg.mtp_layers[:length])


def _settled_vocabulary(cfg: Config, found: dict[str, AnyStored], notes: list[str]) -> Config:
    """Return the configuration with as many tokens as the embedding and lm_head have rows, if both agree."""
    names = ["backbone.embeddings.weight"] + ["lm_head.weight"] * (not cfg.tie_word_embeddings)
    shapes = {found[name].shape for name in names if name in found}
    rows, width = next(iter(shapes)) if len(shapes) == 1 and len(next(iter(shapes))) == 2 else (0, 0)
    if not all(name in found for name in names) or width != cfg.hidden_size or rows in (0, cfg.vocab_size):
        return cfg
    notes.append(f"config.json has vocab_size = {cfg.vocab_size}, the embedding {rows} rows: {rows} counts")
    return replace(cfg, vocab_size=rows)


def _settled_attention(cfg: Config, found: dict[str, AnyStored], notes: list[str]) -> Config:
    """Return the configuration with as many key/value heads as k_proj has rows for, where q_proj fits.

    InputError where num_key_value_heads may be right instead, and the number and size of heads wrong: no
    tensor tells 8 heads of 16 from 4 of 32.
    """
    first = f"backbone.layers.{cfg.layers.find('*')}.mixer."
    q, k = (found.get(f"{first}{each}_proj.weight") for each in "qk")
    heads, size = cfg.num_attention_heads, cfg.head_dim
    if q is None or k is None or len(k.shape) != 2 or q.shape[:1] != (heads * size,) or k.shape[0] % size:
        return cfg
    kv = k.shape[0] // size
    if kv in (0, cfg.num_key_value_heads) or heads % kv:
        return cfg
    given, other = cfg.num_key_value_heads, k.shape[0] // cfg.num_key_value_heads
    what = f"config.json has num_key_value_heads = {given}"
    if other * given == k.shape[0] and q.shape[0] % other == 0 and q.shape[0] // other % given == 0:
        rows = f"q_proj has {q.shape[0]} rows and k_proj {k.shape[0]}"
        one = f"{heads} heads of {size} with num_key_value_heads = {kv}"
        raise InputError(
            f"{what}, but {rows}: that is {one}, or {q.shape[0] // other} heads of {other} with {given}; "
            "correct num_attention_heads, head_dim or num_key_value_heads in config.json"
        )
    notes.append(f"{what}, and k_proj {k.shape[0]} rows: {kv} counts")
    return replace(cfg, num_key_value_heads=kv)


def _settled_latent(cfg: Config, found: dict[str, AnyStored], notes: list[str]) -> Config:
    """Return the configuration with the latent of the experts that the tensors have, where all of them agree.

    The projections into the latent and back and the matrices of the experts have its width; without a latent
    there are no such projections, and the experts work at full width.
    """
    widths: set[int] = set()
    projections = False
    for name, at in found.items():
        part = (EXPERT if ".experts." in name else LATENT).search(name)
        if part is None or not name.startswith("backbone.") or len(at.shape) < 2:
            continue
        projections |= part[1] in ("fc1", "fc2")
        widths.add(at.shape[-2 if part[1] in ("fc1", "down") else -1])  # of its rows, else of its columns
    width = widths.pop() if len(widths) == 1 else 0
    given = cfg.moe_latent_size
    if "E" not in cfg.layers or not width or (width if projections else None) == given:
        return cfg
    if not projections and width != cfg.hidden_size:
        return cfg
    has = f"projections into a latent of {width}" if projections else "no projections into a latent"
    notes.append(f"config.json has moe_latent_size = {shown(given)}, the files have {has}: they count")
    return replace(cfg, moe_latent_size=width if projections else None)


def match(
    cfg: Config, found: dict[str, AnyStored], directory: Path, size: int, notes: list[str]
) -> dict[str, AnyStored]:
    """Return where each tensor of the table lies; `size` is that of all files in bytes."""
    packed = {at.dtype for at in found.values()} - set(DTYPES)
    bits = 16 if not packed else 4 if packed <= set(KINDS) else 1  # GGUF has types below 2
    if _expert_bytes(cfg, bits) > size:  # before the table, which a false config.json can make enormous
        each = f"{cfg.n_routed_experts} in each of {(cfg.layers + cfg.mtp_layers).count('E')} layers"
        what = f"config.json calls for more experts than the {size} bytes of its files can hold ({each})"
        raise InputError(f"{directory}: {what}: is it that of this model, and is the download complete?")
    stored: dict[str, AnyStored] = {}
    missing: list[str] = []
    used: set[str] = set()
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
    notes += _ignored(cfg, left, stored)
    return stored


def _missing(directory: Path, missing: list[str], found: dict[str, AnyStored]) -> InputError:
    """Return the error for missing tensors; it names the prefix of those that are there, if it is unknown."""
    what = f"{directory} lacks the tensor {missing[0]}{_and_more(missing)}"
    prefixes = Counter(layer[1] for name in found if not canonical(name) and (layer := LAYER.match(name)))
    if not prefixes:
        return InputError(f"{what}: is the download complete?")
    (prefix, count), *_ = prefixes.most_common(1)
    known = ", ".join(f"{each}." for each in PREFIXES)
    return InputError(f"{what}; {count} tensors have the prefix {shown(prefix)}, which is none of {known}")


def _place(row: Tensor, found: dict[str, AnyStored], cfg: Config) -> tuple[str, AnyStored | None]:
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


def _checked(at: AnyStored, shape: tuple[int, ...]) -> AnyStored:
    """Return the tensor in this shape, which may differ from the file's in axes of size one."""
    if isinstance(at, Stored) and at.dtype not in DTYPES:
        what = f"{at.dtype}, which is none of {', '.join(DTYPES)}"
        raise InputError(f"{shown(at.name)} in {at.file.path} has the dtype {what}")
    if at.shape == shape:
        return at
    sizes, wanted = ([size for size in each if size != 1] for each in (at.shape, shape))
    if sizes != wanted or not isinstance(at, Stored):
        what = f"{shown(list(at.shape))}, where config.json calls for {list(shape)}"
        raise InputError(f"{shown(at.name)} in {at.file.path} has the shape {what}")
    return at._replace(shape=shape)


def _ignored(cfg: Config, left: dict[str, AnyStored], stored: dict[str, AnyStored]) -> list[str]:
    """Return notes on tensors that are left over and may be ignored; any other is an error."""
    if cfg.tie_word_embeddings and "lm_head.weight" in left:
        _check_tied(left.pop("lm_head.weight"), stored["backbone.embeddings.weight"])
    harmless = [at.name for name, at in left.items() if HARMLESS.search(name)]
    unknown = [at for name, at in left.items() if not HARMLESS.search(name)]
    if unknown:
        what = f"{shown(unknown[0].name)}{_and_more(unknown)}"
        raise InputError(f"{unknown[0].file.path} holds {what}, which the model of config.json does not have")
    if not harmless:
        return []
    scales = any(name.endswith("_scale") for name in harmless)
    unless = " unless keys and values are stored in FP8" if scales else ": not read"
    return [f"{shown(harmless[0])}{_and_more(harmless)} would change nothing{unless}"]


def _check_tied(head: AnyStored, embedding: AnyStored) -> None:
    """Refuse a head that differs from the embedding it is said to be."""
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or any(head.part(i).raw != embedding.part(i).raw for i in range(head.shape[0])):
        what = f"lm_head.weight in {head.file.path} differs from the embedding"
        raise InputError(f"config.json has tie_word_embeddings = true, but {what}")


def _expert_bytes(cfg: Config, bits: int) -> int:
    """Return the least that all routed experts take on disk: two matrices each, of `bits` an element."""
    experts = (cfg.layers + cfg.mtp_layers).count("E") * cfg.n_routed_experts
    return experts * 2 * cfg.moe_intermediate_size * cfg.expert_width * bits // 8


def _twice(a: AnyStored, b: AnyStored) -> InputError:
    both = f"{shown(a.name)} in {a.file.path} and {shown(b.name)} in {b.file.path.name}"
    return InputError(f"{both} name the same tensor: remove one of them")


def _and_more(names: list) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""

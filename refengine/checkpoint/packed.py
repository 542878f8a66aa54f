"""Packed weights in the files of modelopt: find the tensors of each by the contents of the files.

    X.weight U8 [o i/2], X.weight_scale F8_E4M3 [o i/block], X.weight_scale_2 F32 []    NVFP4
    X.weight F8_E4M3 [o i], X.weight_scale F32 []                                       FP8
    X.weight F8_E4M3 [o i], X.weight_scale U8 [o i/32]                                  MXFP8

and with any of them perhaps X.input_scale F32 []. Metadata decides nothing: it names modules that are absent,
lists experts once a layer, and has patterns that match too much. It is compared with the files, and a note
names a tensor that it describes as another kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from refengine.checkpoint.names import canonical, is_ours
from refengine.checkpoint.safetensors_file import MappedFile, Stored
from refengine.spec.arrays import DTYPES
from refengine.spec.config import InputError
from refengine.spec.quant import Packed
from refengine.untrusted import shown

if TYPE_CHECKING:
    from refengine.checkpoint.gguf.stored import Altered, StoredBlocks

KINDS = ("NVFP4", "FP8", "MXFP8")
SCALES = (".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".input_scale", ".pre_quant_scale")
# Other tools, by the endings of their tensors' names.
TOOLS = {
    ".weight_packed": "compressed-tensors",
    ".g_idx": "GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "a tool that scales FP8 in square blocks",
    ".pre_quant_scale": "the AWQ method of modelopt",
}
EXPERTS = (".experts.up_proj", ".experts.down_proj")
UNREADABLE = {
    "I8",
    "U32",
    "F4",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
}  # dtypes of other formats
ALGORITHMS = {  # of modelopt's metadata
    "NVFP4": "NVFP4", "W4A16_NVFP4": "NVFP4", "W4A8_NVFP4_FP8": "NVFP4", "FP8": "FP8", "MXFP8": "MXFP8",
}  # fmt: skip
NAN = 0x7F  # of E4M3, without its sign


class StoredPacked(NamedTuple):
    """Holds where the tensors of one packed weight lie; `dtype` is its kind, `shape` that of the matrix."""

    dtype: str
    shape: tuple[int, ...]
    codes: Stored
    scale: Stored
    scale_2: Stored | None
    input_scale: Stored | None

    @property
    def name(self) -> str:
        """Return the name of the codes in their file."""
        return self.codes.name

    @property
    def file(self) -> MappedFile:
        """Return the file that holds the codes."""
        return self.codes.file

    @property
    def tensors(self) -> list[Stored]:
        """Return the tensors that make the weight."""
        return [at for at in (self.codes, self.scale, self.scale_2, self.input_scale) if at is not None]

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales."""
        return sum(at.nbytes for at in self.tensors)

    @property
    def raw(self) -> bytes:
        """Return the bytes of codes and scales as they are in the files."""
        return b"".join(at.raw for at in self.tensors)

    def part(self, i: int) -> StoredPacked:
        """Return row i of the matrix."""
        scale = self.scale.part(i) if self.dtype != "FP8" else self.scale
        return self._replace(shape=self.shape[1:], codes=self.codes.part(i), scale=scale)

    def array(self) -> Packed:
        """Return the weight, of views of the files; InputError names a scale that has no meaning."""
        codes, given = _bytes(self.codes), None if self.input_scale is None else _float(self.input_scale)
        inputs = given if given is not None and np.isfinite(given) and given > 0 else None
        if self.dtype == "FP8":
            scale = np.array(_checked_float(self.scale))
            if not scale and not np.isin(codes & np.uint8(NAN), (0, NAN)).all():
                raise _wrong(self.scale, "is 0")
            return Packed("FP8", codes, scale, None, inputs)
        scale = _bytes(self.scale)
        if self.dtype == "MXFP8":
            if (scale == 255).any():
                raise _wrong(self.scale, "holds a NaN")
            return Packed("MXFP8", codes, scale, None, inputs)
        assert self.scale_2 is not None
        scale_2 = _checked_float(self.scale_2)
        if scale_2 == 0 and codes.any() and not (scale & np.uint8(NAN) == NAN).all():
            raise _wrong(self.scale_2, "is 0")
        if scale_2 and scale.size and scale.max() >= NAN:  # the sign is the highest bit
            what = "a NaN" if (scale & np.uint8(NAN) == NAN).any() else "a negative number"
            raise _wrong(self.scale, f"holds {what}")
        return Packed("NVFP4", codes, scale, scale_2, inputs)

    def release(self) -> None:
        """Give back the memory that reading filled; a later read fills it again."""
        for at in self.tensors:
            at.release()


class Unread(NamedTuple):
    """Holds a tensor that is not here: its name, its dtype or kind, its shape, and the bytes of its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def array(self) -> Any:
        """Raise InputError: there is nothing to read."""
        raise InputError(f"{self.name} is not here: download the weights")

    def release(self) -> None:
        """Do nothing: no memory was filled."""


AnyStored: TypeAlias = "Stored | StoredPacked | StoredBlocks | Altered"


def check_input_scale(at: Stored) -> None:
    """Raise InputError unless a scale of inputs is a finite number above 0."""
    if not _checked_float(at):
        raise _wrong(at, "is 0")


def _bytes(at: Stored) -> Any:
    """Return a tensor of one-byte elements as uint8."""
    return np.frombuffer(at.file.map, np.uint8, at.nbytes, at.offset).reshape(at.shape)


def _float(at: Stored) -> np.float32:
    """Return the one element of an F32 tensor."""
    return np.float32(at.array().reshape(-1)[0])


def _checked_float(at: Stored) -> np.float32:
    """Return a scale; InputError if it is negative or not a finite number."""
    value = _float(at)
    if not np.isfinite(value) or value < 0:
        raise _wrong(at, f"is {value}")
    return value


def _wrong(at: Stored, what: str) -> InputError:
    return InputError(f"{at.file.path} is damaged: the scale {shown(at.name)} {what}; download it again")


def with_packed(found: dict[str, Any], directory: Path, said: Any = None) -> dict[str, Any]:
    """Return the tensors of the files by name, those of each packed weight as one.

    said: the quantization_config of config.json, of which only the name of the tool counts, in an InputError.
    """
    try:
        _refuse_tools(found, directory)
        return _with_packed(found, directory)
    except InputError as error:
        tool = said.get("quant_method") if isinstance(said, dict) else None
        if tool in (None, "modelopt"):
            raise
        raise InputError(f"{error}; config.json names the tool {shown(tool)}") from None


def _with_packed(found: dict[str, Any], directory: Path) -> dict[str, Any]:
    out = dict(found)
    for name, at in found.items():
        if at.dtype in DTYPES or name.endswith(SCALES) or not is_ours(name):
            continue
        if name.endswith(".weight") and at.dtype in ("U8", "F8_E4M3"):
            base = name.removesuffix("weight")
            scale, scale_2 = out.pop(f"{base}weight_scale", None), out.pop(f"{base}weight_scale_2", None)
            out[name] = _packed(at, scale, scale_2, out.pop(f"{base}input_scale", None))
        elif at.dtype in UNREADABLE and name.endswith((".weight", *EXPERTS)):
            raise _unsupported(directory, f"{shown(at.name)} is {at.dtype}")
        elif at.dtype in ("U8", "F8_E4M3") and name.endswith(EXPERTS):
            raise _unsupported(directory, f"{shown(at.name)} is a stack of packed experts")
    for name, at in out.items():
        if name.endswith(SCALES) and is_ours(name):
            ours = f"{name.rpartition('.')[0]}.weight"
            none = "no weight is packed" if len(out) == len(found) else f"{shown(ours)} is not packed"
            what = f"{at.file.path} holds {shown(at.name)}, a scale for packed weights"
            raise InputError(f"{what}, but {none}: there is nothing to multiply by it")
    return out


def _refuse_tools(found: dict[str, Any], directory: Path) -> None:
    """Raise InputError that names the tool which has packed the weights, if it is not one that is read."""
    suspects = {name: at for name, at in found.items() if name.endswith(tuple(TOOLS)) and is_ours(name)}
    ends = {end: at for name, at in suspects.items() for end in TOOLS if name.endswith(end)}
    for end, tool in TOOLS.items():
        if end in ends and not (end == ".weight_scale_inv" and ends[end].dtype not in ("F32", "BF16")):
            raise _unsupported(directory, f"{shown(ends[end].name)} is of {tool}")


def _unsupported(directory: Path, what: str) -> InputError:
    why = f"{what}; those of modelopt in NVFP4, FP8 and MXFP8 are read"
    return InputError(f"{directory} is quantized in a way that is not supported: {why}")


def _packed(at: Stored, scale: Stored | None, scale_2: Stored | None, inputs: Stored | None) -> StoredPacked:
    """Return one packed weight; InputError names the tensor that is missing or that does not fit."""
    base = at.name.removesuffix(".weight")
    if len(at.shape) != 2:
        raise _unfit(at, f"the shape {shown(list(at.shape))}", "a matrix")
    rows, width = at.shape
    if scale is None:
        raise _missing(at, f"{base}.weight_scale")
    for each in (scale_2, inputs):
        if each is not None:
            _check_one(each)
    if at.dtype == "U8":
        if scale_2 is None:
            raise _missing(at, f"{base}.weight_scale_2")
        if scale.dtype != "F8_E4M3":
            raise _unfit(scale, f"the dtype {scale.dtype}", f"F8_E4M3 beside {shown(at.name)}, which is U8")
        _check_blocks(scale, rows, 2 * width)
        return StoredPacked("NVFP4", (rows, 2 * width), at, scale, scale_2, inputs)
    if scale_2 is not None:
        raise _unfit(at, "the dtype F8_E4M3", f"U8 beside {shown(scale_2.name)}")
    if scale.dtype in ("U8", "F8_E8M0"):
        _check_blocks(scale, rows, width)
        return StoredPacked("MXFP8", at.shape, at, scale, None, inputs)
    _check_one(scale)
    return StoredPacked("FP8", at.shape, at, scale._replace(shape=()), None, inputs)


def _check_one(at: Stored) -> None:
    """Raise InputError unless a tensor is one float32."""
    if at.dtype != "F32":
        raise _unfit(at, f"the dtype {at.dtype}", "F32")
    if at.nbytes != 4:
        raise _unfit(at, f"the shape {shown(list(at.shape))}", "a single number")


def _check_blocks(at: Stored, rows: int, columns: int) -> None:
    """Raise InputError unless a tensor has a scale for each of some equal blocks of each row."""
    fits = len(at.shape) == 2 and at.shape[0] == rows and at.shape[1] and columns % at.shape[1] == 0
    if not fits or columns // at.shape[1] % 2:
        raise _unfit(at, f"the shape {shown(list(at.shape))}", f"equal blocks of {[rows, columns]}")


def _missing(at: Stored, name: str) -> InputError:
    what = f"{at.file.path} holds packed weights, {shown(at.name)} ({at.dtype} {shown(list(at.shape))})"
    return InputError(f"{what}, but {shown(name)} is missing: is the download complete?")


def _unfit(at: Stored, what: str, wanted: str) -> InputError:
    return InputError(f"{shown(at.name)} in {at.file.path} has {what}, where its weights call for {wanted}")


def _kind(entry: Any) -> str | None:
    """Return the kind that an entry of the metadata describes, if it is a known one."""
    name = entry.get("quant_algo") if isinstance(entry, dict) else None
    return ALGORITHMS.get(name) if isinstance(name, str) else None


def contradictions(said: Any, where: str, stored: dict[str, Any]) -> list[str]:
    """Return a note if metadata describes weights as another kind than the files hold; `stored` by name."""
    said = said.get("quantization", said) if isinstance(said, dict) else None
    if not isinstance(said, dict):
        return []
    kinds = {
        name.removesuffix(".weight"): at.dtype for name, at in stored.items() if name.endswith(".weight")
    }
    packed = {module: kind for module, kind in kinds.items() if kind in KINDS}
    wrong: list[tuple[str, str]] = []
    listed = said.get("quantized_layers")
    if isinstance(listed, dict):
        for name, entry in listed.items():
            kind = _kind(entry)
            module = (canonical(f"{name}.weight") or "").removesuffix(".weight")
            if kind and module in kinds and kinds[module] != kind:
                wrong.append((module, kind))
    elif kind := _kind(said):
        wrong = [(module, kind) for module, other in packed.items() if other != kind]
    excluded = said.get("exclude_modules") or said.get("ignore")
    for name in excluded if isinstance(excluded, list) else []:
        module = (canonical(f"{name}.weight") or "").removesuffix(".weight")
        if module in packed:
            wrong.append((module, "not packed"))
    if not wrong:
        return []
    module, kind = wrong[0]
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return [
        f"{where} calls {shown(module)}{more} {kind}, the files hold it as {kinds[module]}: the files count"
    ]

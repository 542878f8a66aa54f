"""A trace: the activations of a model on given tokens, by name, in one safetensors file.

    token_ids  in the header: a list of ids for each sequence
    calls      in the header: for each call how many tokens of each sequence it read; absent: one call, all
    layers.7.input, layers.7.output, layers.7.in_proj, ...   [sequence, position, ...]: `watch.STEPS`
    layers.7.S, layers.7.tail                                [sequence, ...]: the state after the last call
    embeddings, final_hidden, logits, mtp.*                  before and after the layers, and the head

The positions are those of the first call, padded to its longest row, then those of the next, and so on. The
prediction head reads each row in one call, without its last token.

Only inputs or outputs of the layers are needed; all else narrows a finding down. docs/traces.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from refengine.checkpoint.safetensors_file import SafetensorsFile, Stored
from refengine.spec.arrays import DTYPES, ITEMSIZE
from refengine.spec.config import Config, InputError
from refengine.untrusted import parse_json, shown

INTS: dict[str, np.dtype] = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "U32": np.dtype(np.uint32)}
CODES = {dtype: code for code, dtype in (DTYPES | INTS).items()}
SHORT = {"f64": "float64", "f32": "float32", "f16": "float16", "half": "float16", "bf16": "bfloat16"}
ALIGN = 64  # bytes
MOST_TOKENS = 1 << 24
NAMED = ("fingerprint", "weights_dtype", "packed_dtype")  # in the header, of the same names in a Trace


@dataclass(frozen=True)
class Trace:
    """Holds a trace: `token_ids` of each row, `calls` as in the header, arrays by name."""

    name: str
    token_ids: list[list[int]]
    calls: list[list[int]]
    dtype: str  # of the computation, as in "bfloat16"
    arrays: Mapping[str, np.ndarray | Stored] = field(repr=False)
    engine: str = "an unnamed engine"
    fingerprint: str = ""
    weights_dtype: str = ""
    packed_dtype: str = ""  # that packed weights were dequantized to; "": weights_dtype

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row."""
        return np.array([len(row) for row in self.token_ids])

    @property
    def head_calls(self) -> list[list[int]]:
        """Return the one call of the prediction head: all tokens of each row but the last."""
        return [[len(row) - 1 for row in self.token_ids]]

    @property
    def ids(self) -> np.ndarray:
        """Return the token ids of the positions [b l], zeros at padding."""
        out = np.zeros(real_positions(self.calls).shape, np.int64)
        out[real_positions(self.calls)] = [i for row in self.token_ids for i in row]
        return out

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def array(self, name: str) -> np.ndarray:
        """Return an array as it is stored."""
        found = self.arrays[name]
        return _values(found) if isinstance(found, Stored) else found

    def rows(self, name: str, *tail: int) -> np.ndarray:
        """Return an array of positions as [b l *tail].

        Raises InputError for another size, for whole numbers where real ones are expected, and for a number
        that is not finite; padding may hold anything.
        """
        head = name.startswith("mtp.")
        real = real_positions(self.head_calls if head else self.calls)
        b, length = real.shape
        a, one = self.array(name), prod(tail)
        found = next((n for n in (length, length + head) if a.size == b * n * one), None)
        if found is None or not (a.shape[:2] == (b, found) or (b == 1 and a.shape[0] == found)):
            size = [b, length, *tail] if b > 1 else [length, *tail]
            raise InputError(f"{self.name}: {name} has the shape {list(a.shape)}, where {size} is expected")
        a = self._real(name, a).reshape(b, found, *tail)[:, :length]
        finite = np.isfinite(a if a.dtype.kind != "V" else a.astype(np.float32))
        wrong = np.argwhere(~finite.reshape(b, length, -1).all(-1) & real)
        if len(wrong):
            at = f"sequence {wrong[0][0]}, position {wrong[0][1]}"
            raise InputError(f"{self.name}: {name} holds a number that is not finite, first at {at}")
        return a if finite.all() else np.where(finite, a, np.zeros((), a.dtype))

    def state(self, name: str, *tail: int) -> np.ndarray:
        """Return an array of one value a row, as [b *tail]; InputError as in `rows`."""
        a, b = self.array(name), len(self.token_ids)
        if a.size != b * prod(tail):
            raise InputError(
                f"{self.name}: {name} has the shape {list(a.shape)}, where {[b, *tail]} is expected"
            )
        if not np.isfinite(self._real(name, a).astype(np.float32)).all():
            raise InputError(f"{self.name}: {name} holds a number that is not finite")
        return a.reshape(b, *tail)

    def coarser(self) -> list[str]:
        """Return the names of the arrays that are stored with a larger rounding than the header's dtype."""
        allowed, found = eps_of(self.dtype), []
        for name, a in self.arrays.items():
            dtype = (DTYPES.get(a.dtype) if isinstance(a, Stored) else a.dtype) or np.dtype(np.int32)
            if dtype.kind not in "iub" and eps_of(dtype.name) > allowed:
                found.append(name)
        return found

    def _real(self, name: str, a: np.ndarray) -> np.ndarray:
        """Return an array; InputError where it holds whole numbers and is no choice of experts."""
        if a.dtype.kind in "iub" and not name.endswith(".router.experts"):
            what = f"holds whole numbers ({a.dtype.name}), where an activation is of a float dtype"
            raise InputError(f"{self.name}: {name} {what}")
        return a

    def save(self, path: str | Path) -> None:
        """Write the trace as one safetensors file, which gets its name when it is whole."""
        header: dict[str, dict] = {"__metadata__": {"format": "refengine trace 1", **self._metadata()}}
        end, arrays = 0, {name: np.ascontiguousarray(self.array(name)) for name in self.arrays}
        ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)  # so that each is aligned
        for name, a in ordered:
            begin, end = end, end + a.nbytes
            entry = {"dtype": CODES[a.dtype], "shape": a.shape, "data_offsets": [begin, end]}
            header[name] = entry
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGN)
        path = Path(path)
        partial = path.with_name(
            f".{path.name}.partial"
        )  # `path` may be the file that the arrays are read from
        try:
            with open(partial, "wb") as file:
                file.write(len(raw).to_bytes(8, "little") + raw)
                for _, a in ordered:
                    file.write(a.reshape(-1).view(np.uint8).data)
            partial.replace(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
        finally:
            with suppress(OSError):
                partial.unlink()

    def _metadata(self) -> dict[str, str]:
        texts = {key: getattr(self, key) for key in (*NAMED, "dtype", "engine")}
        lists = {"token_ids": self.token_ids, "calls": self.calls}
        return {key: text for key, text in texts.items() if text} | {
            key: json.dumps(value, separators=(",", ":")) for key, value in lists.items()
        }


def load(path: str | Path) -> Trace:
    """Return the trace in a file, its header checked; arrays stay in the memory map until they are used."""
    try:
        file = SafetensorsFile(Path(path))
    except InputError as error:  # a trace was written here, and not downloaded
        raise InputError(str(error).replace("download it again", "write it again")) from None
    said = parse_json(file.header, f"the header of {path}").get("__metadata__", {})
    if "token_ids" not in said:
        raise InputError(f"{path} is not a trace: its header has no token_ids")
    ids = _lists(path, "token_ids", said["token_ids"], MOST_TOKENS)
    lengths = [len(row) for row in ids]
    if not lengths or not min(lengths):
        raise InputError(f"{path}: token_ids holds a row without a token")
    calls = _lists(path, "calls", said["calls"], MOST_TOKENS) if "calls" in said else [lengths]
    for i, call in enumerate(calls):
        if len(call) != len(ids):
            raise InputError(f"{path}: call {i} names {len(call)} rows, and token_ids has {len(ids)}")
    if [sum(row) for row in zip(*calls, strict=True)] != lengths:
        raise InputError(f"{path}: the calls do not add up to the {lengths} tokens of the rows")
    for at in file.tensors.values():
        if not at.name.isprintable():
            raise InputError(f"{path}: {shown(at.name)} is no name of an activation")
        if at.dtype not in DTYPES | INTS:
            raise InputError(f"{path}: {shown(at.name)} has the dtype {at.dtype}, which no activation has")
    dtype = _dtype_name(said.get("dtype", "")) or _coarsest(file.tensors.values())
    named = {key: _printable(said.get(key, "")) for key in NAMED}
    named |= {key: _dtype_name(named[key]) for key in named if key.endswith("dtype")}
    for name in (dtype, *(text for key, text in named.items() if text and key.endswith("dtype"))):
        if name not in ITEMSIZE:
            raise InputError(f"{path}: {shown(name)} is none of the dtypes {', '.join(ITEMSIZE)}")
    calls = [call for call in calls if any(call)]
    engine = _printable(said.get("engine", "")) or "an unnamed engine"
    return Trace(str(path), ids, calls, dtype, file.tensors, engine, **named)


def eps_of(dtype: str) -> float:
    """Return the distance of 1 from the next number of a float dtype."""
    return float(ml_dtypes.finfo(dtype).eps)


def _printable(text: str) -> str:
    """Return the first 100 characters of a text of the header, in one line: none controls a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:100]


def _dtype_name(text: str) -> str:
    """Return the full name of a dtype in the header, as in "bf16", "BF16" or "torch.bfloat16"."""
    name = text.strip().lower().removeprefix("torch.")
    return SHORT.get(name, name)


def _lists(path, key: str, text: str, most: int) -> list[list[int]]:
    """Return a list of lists of whole numbers from the header; a single list counts as one row."""
    value = parse_json(text.encode(), f"{key} in the header of {path}")
    if isinstance(value, list) and value and not any(isinstance(item, (list, dict)) for item in value):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise InputError(f"{path}: {key} in the header is not a list of lists")
    if sum(map(len, value)) > most:
        raise InputError(f"{path}: {key} in the header holds more than {most} numbers")
    wrong = [i for row in value for i in row if type(i) is not int or not 0 <= i < 2**31]
    if wrong:
        what = f"holds something else than whole numbers from 0 on: {shown(json.dumps(wrong[0]))}"
        raise InputError(f"{path}: {key} in the header {what}")
    return value


def _values(at: Stored) -> np.ndarray:
    if at.dtype in DTYPES:
        return at.array()
    dtype: np.dtype = INTS[at.dtype]
    return np.frombuffer(at.raw, dtype).reshape(at.shape)


def _coarsest(tensors) -> str:
    """Return the name of the float dtype with the largest rounding among these."""
    found = {DTYPES[at.dtype] for at in tensors if at.dtype in DTYPES} or {np.dtype(np.float32)}
    return max(found, key=lambda dtype: eps_of(dtype.name)).name


def real_positions(calls: list[list[int]]) -> np.ndarray:
    """Return [b l] bool: which positions hold a token, each call padded to its longest row."""
    parts = [np.arange(max(call)) < np.array(call)[:, None] for call in calls]
    return np.concatenate(parts, axis=1)


def pieces(a: np.ndarray, calls: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Cut [b l ...] into calls: return (its part; the lengths of its rows, None if all are equal)."""
    start = 0
    for call in calls:
        count = np.asarray(call)
        width = int(count.max())
        yield a[:, start : start + width], None if (count == width).all() else count
        start += width


def packed(a: np.ndarray, calls: list[list[int]]) -> np.ndarray:
    """Return [b l ...] without the padding between the calls of a row: zeros at the end of each row."""
    real = real_positions(calls)
    out = np.zeros((len(a), int(real.sum(1).max()), *a.shape[2:]), a.dtype)
    for row, values, kept in zip(out, a, real, strict=True):
        row[: kept.sum()] = values[kept]
    return out


def sizes(cfg: Config, kind: str) -> dict[str, tuple[int, ...]]:
    """Return {step: axes after [b l]} of the arrays of a layer, or of the parts around the layers."""
    d, v, k = cfg.hidden_size, cfg.vocab_size, cfg.num_experts_per_tok
    common: dict[str, tuple[int, ...]] = {"input": (d,), "norm": (d,), "output": (d,)}
    match kind:
        case "M":
            inner = (cfg.mamba_inner,)
            return common | {
                "in_proj": (sum(cfg.in_proj_widths),), "conv": (cfg.conv_dim,),
                "scan": (cfg.mamba_num_heads, cfg.mamba_head_dim), "gated_norm": inner, "out_proj": (d,),
            }  # fmt: skip
        case "*":
            y = (cfg.num_attention_heads, cfg.head_dim)
            return common | {"qkv_proj": (sum(cfg.qkv_widths),), "attention": y, "o_proj": (d,)}
        case "E":
            x = (cfg.expert_width,)
            latent: dict[str, tuple[int, ...]] = (
                {"fc1_latent_proj": x, "fc2_latent_proj": (d,)} if cfg.moe_latent_size else {}
            )
            names: dict[str, tuple[int, ...]] = {
                "router.experts": (k,),
                "router.weights": (k,),
                "shared": (d,),
                "experts": x,
            }
            return common | names | latent
        case "-":
            return common | {"mlp": (d,)}
    return {
        "embeddings": (d,), "final_hidden": (d,), "logits": (v,), "enorm": (d,), "hnorm": (d,),
        "eh_proj": (d,),
    }  # fmt: skip


def state_sizes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Return {name: axes after [b]} of the state of a Mamba layer."""
    S = (cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size)
    return {"S": S, "tail": (cfg.conv_kernel - 1, cfg.conv_dim)}

"""Choose the dtypes in which keys, values and S are stored, and count the bytes they take.

keys and values   float32, bfloat16, or FP8 with a scale for each layer    default: FP8 where the checkpoint
                  declares it, else as the backend computes
S                 float32, or float16 rounded at random                    default: float32
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from refengine.anatomy import state_bytes
from refengine.checkpoint import Checkpoint
from refengine.checkpoint.names import canonical
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config, InputError
from refengine.spec.numerics import KV_DTYPES, SSM_DTYPES
from refengine.units import bytes_text
from refengine.untrusted import read_json, shown

NAMES = {"uint8": "fp8", "float8_e4m3fn": "fp8"}  # what arrays of FP8 call their dtype
SCALE = re.compile(r"(?:^|\.)((?:mtp\.)?layers\.\d+)\.mixer\.([kv])_proj\.\2_scale$")


@dataclass(frozen=True)
class Storage:
    """Dtypes of keys and values and of S (None: as the backend computes), and the scales of FP8 by block."""

    kv: str | None = None
    ssm: str | None = None
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)


def storage(checkpoint: Checkpoint, kv_dtype: str | None, ssm_dtype: str | None) -> Storage:
    """Return how states are stored: as asked for, else as declared; InputError for an unknown dtype."""
    if kv_dtype not in (None, *KV_DTYPES):
        raise InputError(f"kv_dtype = {kv_dtype!r} is not one of {', '.join(KV_DTYPES)}")
    if ssm_dtype not in (None, *SSM_DTYPES):
        raise InputError(f"ssm_dtype = {ssm_dtype!r} is not one of {', '.join(SSM_DTYPES)}")
    kv = kv_dtype or ("fp8" if declares_fp8(checkpoint) else None)
    return Storage(kv, ssm_dtype, scales(checkpoint) if kv == "fp8" else {})


def declares_fp8(checkpoint: Checkpoint) -> bool:
    """Return whether config.json or hf_quant_config.json declares a cache of keys and values in FP8."""
    said = []
    for name, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        try:
            found = read_json(checkpoint.directory / name)
        except (InputError, OSError):
            continue
        said.append(found.get(key) if isinstance(found, dict) else None)
    return any(isinstance(part, dict) and _is_fp8(part) for part in said)


def _is_fp8(said: dict) -> bool:
    """Return whether a description of quantization has a cache in FP8: modelopt's, or compressed-tensors'."""
    algorithm, scheme = said.get("kv_cache_quant_algo"), said.get("kv_cache_scheme")
    if isinstance(algorithm, str):
        return algorithm.upper() == "FP8"
    return isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float"


def scales(checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """Return the scales of keys and of values by block, as far as the files have them; else 1."""
    found: dict[str, dict[str, float]] = {}
    for file in checkpoint.files:
        for name, at in getattr(file, "tensors", {}).items():
            if part := SCALE.search(canonical(name) or ""):
                if at.dtype not in DTYPES:
                    what = f"{at.dtype}, which is none of {', '.join(DTYPES)}"
                    raise InputError(f"{shown(name)} in {at.file.path} has the dtype {what}")
                found.setdefault(part[1], {})[part[2]] = _positive(at.array(), name)
    return {block: (pair.get("k", 1.0), pair.get("v", 1.0)) for block, pair in found.items()}


def _positive(a: np.ndarray, name: str) -> float:
    """Return the number in an array of one; InputError unless it is positive and finite."""
    value = float(np.asarray(a, np.float32).reshape(-1)[0]) if a.size == 1 else math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{shown(name)} is not one positive number, as the scale of a cache is")
    return value


def bytes_on(backend: str, cfg: Config, dtype: str, kv: str | None = None, ssm: str | None = None) -> dict:
    """Return state_bytes of a backend by its name, for a model that it computes in `dtype`."""
    if backend == "cpu":
        return state_bytes(cfg, "float32", kv or ("bfloat16" if dtype == "bfloat16" else "float32"), ssm)
    if backend == "torch" and dtype != "float32":
        import torch

        from refengine.backends.pytorch.products import activations

        active = activations(getattr(torch, dtype), torch.device("cpu"))
        return state_bytes(cfg, str(active).removeprefix("torch."), kv, ssm)
    return state_bytes(cfg, dtype, kv, ssm)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the states of one sequence: `fixed`, whatever its length, and for each token."""

    fixed: int
    token: int
    kv: str  # dtype of keys and values

    def of(self, tokens: int) -> int:
        """Return the bytes of the states of a sequence of so many tokens."""
        return self.fixed + self.token * tokens

    def growth(self, lengths: Iterable[tuple[int, int]]) -> int:
        """Return the bytes that sequences take until each has grown from `now` to `most` tokens."""
        return sum(self.of(most) - (self.of(now) if now else 0) for now, most in lengths)

    def refusal(self, tokens: int, free: int) -> InputError | None:
        """Return the error for a sequence that does not fit into so many free bytes, or None."""
        if self.of(tokens) <= free:
            return None
        return InputError(
            f"a sequence of {tokens} tokens needs {bytes_text(self.of(tokens))} beside the weights "
            f"({bytes_text(self.token)} of keys and values a token, in {self.kv}), and {bytes_text(free)} "
            f"of memory are free: give fewer tokens" + ("" if self.kv == "fp8" else ", or --kv-dtype fp8")
        )


def sizes(states: list, cfg: Config) -> Sizes | None:
    """Return the bytes of the states of one sequence; None where a backend does not hold them on the host."""
    recurrent = [state for state in states if hasattr(state, "S")]
    caches = [state for state in states if hasattr(state, "k")]
    held = [state.S for state in recurrent] + [state.k for state in caches]
    if not all(str(getattr(a, "device", "cpu")) == "cpu" and hasattr(a, "itemsize") for a in held):
        return None
    fixed = sum(state.S.nbytes + state.tail.nbytes for state in recurrent)
    token = 2 * cfg.num_key_value_heads * cfg.head_dim
    names = {str(cache.k.dtype).removeprefix("torch.") for cache in caches}
    kv = names.pop() if names else "float32"
    return Sizes(fixed, token * sum(cache.k.itemsize for cache in caches), NAMES.get(kv, kv))

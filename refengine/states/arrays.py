"""The states of one sequence as host arrays, of one rank or of the whole model.

    layers.i.tail  t c        layers.i.S  h p n        layers.i.k, layers.i.v  t kv e

    layers.i.k_scale, layers.i.v_scale   where keys and values are FP8, as what their codes are multiplied by

The form does not depend on a backend, on its dtypes or on the layout of ranks: all of them can read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from refengine.spec.config import Config, InputError
from refengine.spec.layout import span
from refengine.spec.ops import Backend
from refengine.spec.shard import Shard
from refengine.spec.state import Cache

Arrays = dict[str, np.ndarray]
KEYS = ("k", "v")  # of an attention layer; what a Mamba layer remembers has one size for ever
SCALES = ("k_scale", "v_scale")  # of an attention layer with keys and values in FP8
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def is_key(name: str) -> bool:
    """Return whether an array holds keys or values, which grow with the sequence."""
    return name.rpartition(".")[2] in KEYS


def of_row(states: list, row: int, backend: Backend, first: int = 0, start: int = 0) -> Arrays:
    """Return copies of what layers first, first + 1, ... remember of one row of a batch.

    start: the first position whose keys and values are returned.
    """
    found: Arrays = {}
    for i, state in enumerate(states, first):
        if state is None:
            continue
        if hasattr(state, "S"):
            found[f"layers.{i}.tail"] = _copied(backend.fetch(state.tail[row]))
            found[f"layers.{i}.S"] = _copied(backend.fetch(state.S[row]))
        else:
            stop = int(backend.fetch(state.length[row : row + 1])[0])
            for name in KEYS:
                found[f"layers.{i}.{name}"] = a = _positions(state, name, row, slice(start, stop), backend)
                if a.dtype == FP8:
                    found[f"layers.{i}.{name}_scale"] = _copied(np.array(_scale(state, name), np.float32))
    return found


def _positions(state, name: str, row: int, at: slice, backend: Backend) -> np.ndarray:
    """Return some positions of the keys or values of a row, t kv e."""
    a = getattr(state, name)
    if isinstance(state, Cache):  # the spec's cache is b t kv e, the others' b kv t e
        found = _copied(backend.fetch(a[row, at]))
    else:
        found = _copied(backend.fetch(a[row, :, at]).swapaxes(0, 1))
    return found.view(FP8) if found.dtype == np.uint8 else found


def _scale(state, name: str) -> float:
    """Return the number that the FP8 codes of keys or values are multiplied by."""
    if (stored := getattr(state, "stored", None)) is not None:
        return getattr(stored, f"{name}_scale")
    return getattr(state, "scales", (1.0, 1.0))[KEYS.index(name)]


def _copied(a: np.ndarray) -> np.ndarray:
    """Return a copy whose elements lie side by side, which nothing writes to."""
    a = np.array(a, order="C")
    a.flags.writeable = False
    return a


def to_states(empty: list, arrays: Arrays, backend: Backend, first: int, position: int) -> list:
    """Return states of one row that remember what the arrays hold, after so many tokens.

    empty: states of layers first, first + 1, ... that have read nothing.
    """
    states = []
    for i, state in enumerate(empty, first):
        if hasattr(state, "S"):
            kept = {name: arrays[f"layers.{i}.{name}"][None] for name in ("tail", "S")}
            if getattr(state, "position", None) is not None:  # S is rounded at random, by the position
                kept["position"] = np.array([position])
            state = replace(state, **{n: _like(a, getattr(state, n), backend) for n, a in kept.items()})
        elif state is not None and position:
            dtype = _computed(empty)
            k, v = (backend.array(_wide(arrays, f"layers.{i}.{name}", dtype)[None]) for name in KEYS)
            state = state.append(k, v)
        states.append(state)
    return states


def _computed(states: list) -> np.dtype:
    """Return the dtype in which a backend computes keys and values, by its states of nothing."""
    dtypes = [_dtype(s.tail if hasattr(s, "S") else s.k) for s in states if s is not None]
    return next((dtype for dtype in dtypes if dtype.itemsize > 1), np.dtype(np.float32))


def _dtype(a) -> np.dtype:
    """Return the dtype of an array of any library."""
    return np.dtype(str(a.dtype).removeprefix("torch."))


def _wide(arrays: Arrays, name: str, dtype: np.dtype) -> np.ndarray:
    """Return keys or values in the dtype of the computation."""
    a, scale = arrays[name], arrays.get(f"{name}_scale")
    if scale is not None:
        a = a.astype(np.float32) * scale
    return np.array(a, dtype, order="C")


def _like(a: np.ndarray, other, backend: Backend) -> Any:
    """Return a copy of a host array, here, in the dtype of another array."""
    return backend.array(np.array(a, _dtype(other), order="C"))


def joined(parts: list[Arrays]) -> Arrays:
    """Return the arrays of a sequence from those of its stretches: all keys and values, and the last rest."""
    *before, last = parts
    return {
        name: np.concatenate([*(part[name] for part in before), a]) if before and is_key(name) else a
        for name, a in last.items()
    }


def shapes(cfg: Config, position: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of the whole model after so many tokens."""
    found: dict[str, tuple[int, ...]] = {}
    for i, kind in enumerate(cfg.layers):
        if kind == "M":
            found[f"layers.{i}.tail"] = cfg.conv_kernel - 1, cfg.conv_dim
            found[f"layers.{i}.S"] = cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size
        elif kind == "*":
            for name in KEYS:
                found[f"layers.{i}.{name}"] = position, cfg.num_key_value_heads, cfg.head_dim
    return found


def check(cfg: Config, arrays: Arrays, position: int, source: str) -> None:
    """Raise InputError unless these are the arrays of this model after so many tokens."""
    expected = shapes(cfg, position)
    scales = {f"{name}_scale": () for name in expected if is_key(name) and f"{name}_scale" in arrays}
    expected |= scales
    if odd := sorted(expected.keys() ^ arrays.keys()):
        what = "lacks" if odd[0] in expected else "has"
        raise InputError(f"{source} {what} the tensor {odd[0]}, and the model's layers do not agree")
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise InputError(f"{source}: {name} is {list(arrays[name].shape)}, not {list(shape)}")
        if arrays[name].dtype.kind not in "fV":  # V: the small floats of ml_dtypes
            raise InputError(f"{source}: {name} holds no floating-point numbers but {arrays[name].dtype}")


def held(name: str, cfg: Config, shard: Shard) -> tuple[int, list[range]] | None:
    """Return the axis along which ranks cut an array, and the ranges that a rank holds; None if not any."""
    _, layer, what = name.split(".")
    first, last = shard.layers(cfg)
    if not first <= int(layer) < last:
        return None
    tp, t = shard.layout.tp, shard.at[0]
    if what in SCALES:
        return 0, []
    if what == "S":
        return 0, [span(cfg.mamba_num_heads, tp, t)]
    if what in KEYS:
        return 1, [span(cfg.num_key_value_heads, tp, t)]
    widths = (cfg.mamba_num_heads, cfg.mamba_head_dim), *[(cfg.n_groups, cfg.ssm_state_size)] * 2
    ranges, start = [], 0
    for heads, width in widths:  # x, B and C, each cut by itself
        mine = span(heads, tp, t)
        ranges.append(range(start + mine.start * width, start + mine.stop * width))
        start += heads * width
    return 1, ranges


def cut(arrays: Arrays, cfg: Config, shard: Shard) -> Arrays:
    """Return the part of a whole model's arrays that a rank holds."""
    found: Arrays = {}
    for name, a in arrays.items():
        if at := held(name, cfg, shard):
            axis, ranges = at
            found[name] = np.concatenate([a.take(part, axis) for part in ranges], axis) if ranges else a
    return found


def whole_of(parts: Iterable[tuple[Shard, Arrays]], cfg: Config) -> Arrays:
    """Return a whole model's arrays from the parts of ranks, of which several may hold the same."""
    found: Arrays = {}
    for shard, arrays in parts:
        for name, a in arrays.items():
            at = held(name, cfg, shard)
            assert at is not None, name
            axis, ranges = at
            if not ranges:
                found[name] = a
            elif name not in found:
                found[name] = np.empty(shapes(cfg, len(a))[name], a.dtype)
            begin = 0
            for part in ranges:
                here = (slice(None),) * axis + (slice(part.start, part.stop),)
                there = (slice(None),) * axis + (slice(begin, begin + len(part)),)
                found[name][here] = a[there]
                begin += len(part)
    return found

"""Vectors: inputs, parameters and right outputs of every operation, in files that any language reads.

A set is a directory: `manifest.json`, and a safetensors or JSON file for each case (docs/vectors.md). This
module holds one case in memory, judges outputs against it, and checks a backend against a set; sets are read
and written by `refengine.conformance.vectors.files`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config
from refengine.spec.numerics import tolerance
from refengine.spec.ops import Backend
from refengine.spec.tensors import Tensor, table

TESTED = ("float64", "float32", "float16", "bfloat16")  # dtypes for which a manifest states tolerances
CLOSE = 4.0  # a router margin of at most so many eps, times the root of the layers, may be lost to rounding
MOST = 0.1  # no error is allowed beyond it, however coarse the dtype: it would say nothing


class Row(NamedTuple):
    """Holds the judgement of one case: its worst output, that output's error, and the error allowed.

    Both are absolute errors over max(1, the largest right value). `note` is empty, or a sentence: an
    exception, a wrong shape, or how many positions were set apart as near-ties of the router.
    """

    operation: str
    case: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the error is allowed."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Output:
    """States how one output is judged.

    expected  the tensor of the file that holds the right values
    terms     the number of products that one value is a sum of
    stretch   the factor by which a division, or a difference of large sums, enlarges the rounding before it
    valid     "" where every value counts, or the input that holds how many positions of each row are real
    ties      "" or the reach of a near-tie of the router: "position", "onwards" or "row"
    layers    the number of layers whose rounding a router may have met
    optional  whether an implementation may keep it in a form of its own, and leave it out
    exact     whether no error at all is allowed: of whole numbers
    """

    expected: str
    terms: int
    stretch: float = 1.0
    valid: str = ""
    ties: str = ""
    layers: int = 1
    optional: bool = False
    exact: bool = False

    def allowed(self, dtype) -> float:
        """Return the error that `dtype` is allowed, over max(1, the largest right value)."""
        return 0.0 if self.exact else min(MOST, tolerance(as_dtype(dtype), self.terms) * self.stretch)


@dataclass(frozen=True)
class Vector:
    """Holds one case: `arrays` by name, or for texts `texts`; and how its outputs are judged.

    Arrays are "in.NAME" (an input), "out.NAME" (a right output, by the float64 definition),
    "transformers.NAME" (the same as recorded from transformers, float32), "margin" [b l] (how far the
    router's choice lies from another one), and weights under their names in a checkpoint.
    """

    name: str
    operation: str
    why: str
    seed: int
    sources: dict[str, str]
    config: dict = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    texts: list[dict] = field(default_factory=list)

    @cached_property
    def cfg(self) -> Config:
        """Return the configuration of the model that the weights belong to."""
        return Config.from_hf(self.config)

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """Return the tensor table by name."""
        return {row.name: row for row in table(self.cfg)}

    def read(self, name: str) -> np.ndarray:
        """Return a weight in the dtype of a released file; zeros where the case does not need it."""
        row = self.rows[name]
        values = self.arrays.get(name)
        return np.zeros(row.shape, DTYPES[row.dtype]) if values is None else values.astype(DTYPES[row.dtype])

    def part(self, which: str) -> dict[str, np.ndarray]:
        """Return the arrays of one kind ("in", "out", "transformers") by their names without the prefix."""
        return {key.split(".", 1)[1]: a for key, a in self.arrays.items() if key.startswith(which + ".")}

    def close(self, output: Output, dtype) -> np.ndarray | None:
        """Return [b l] bool: the positions whose experts rounding in `dtype` could exchange; None without."""
        if not output.ties or "margin" not in self.arrays:
            return None
        close = self.arrays["margin"] <= CLOSE * eps(dtype) * output.layers**0.5
        if output.ties == "onwards":
            return np.logical_or.accumulate(close, axis=1)
        return (
            np.broadcast_to(close.any(axis=1, keepdims=True), close.shape) if output.ties == "row" else close
        )


def eps(dtype) -> float:
    """Return the distance from 1 to the next number of `dtype`."""
    return tolerance(as_dtype(dtype), 1) / 4


def as_dtype(dtype) -> np.dtype:
    """Return the NumPy dtype of a name such as "bfloat16", or of a dtype."""
    by_name = {d.name: d for d in DTYPES.values()}
    return by_name.get(dtype) or np.dtype(dtype) if isinstance(dtype, str) else np.dtype(dtype)


def judge(vector: Vector, answers: dict[str, Any], dtype, against: str = "out") -> list[Row]:
    """Return a row for each output of the case that `answers` holds or lacks, in the order of the manifest.

    answers: arrays by the names of the outputs. against: "out", or "transformers" for its recordings.
    """
    return [judge_output(vector, name, answers.get(name), dtype, against) for name in vector.outputs]


def judge_output(vector: Vector, name: str, actual, dtype, against: str = "out") -> Row:
    """Return the row of one output; `actual` is an array, or None where there is none."""
    output = vector.outputs[name]
    allowed = output.allowed(dtype)

    def row(error: float, note: str = "") -> Row:
        return Row(vector.operation, vector.name, error, allowed, note and f"{name}: {note}")

    key = output.expected if against == "out" else f"{against}.{name}"
    if key not in vector.arrays:
        return row(0.0, f"no recording of {against}")
    if actual is None:
        return row(0.0 if output.optional else np.inf, "not given")
    expected = np.asarray(vector.arrays[key], np.float64)
    actual = np.asarray(actual)
    if actual.shape != expected.shape:
        return row(np.inf, f"shape {actual.shape}, not {expected.shape}")
    counted = keep = kept(vector, output, expected.shape)
    close = vector.close(output, dtype)
    if close is not None:
        apart = np.asarray(close.any(axis=1)) if output.ties == "row" else close
        keep = counted & ~spread(apart, expected.ndim)
    left, all_of_them = (int(np.atleast_1d(k)[..., :1].sum()) for k in (keep, counted))
    note = (
        "" if left == all_of_them else f"{all_of_them - left} of {all_of_them} set apart: a tie of the router"
    )
    if not keep.any():
        return row(0.0, note)
    error = np.abs(actual.astype(np.float64) - expected)[keep] / max(1.0, np.abs(expected).max())
    worst = float(error.max())
    return row(worst if worst == worst else np.inf, note if worst == worst else "a value is NaN")


def kept(vector: Vector, output: Output, shape: tuple[int, ...]) -> np.ndarray:
    """Return which values of an output count, bool of its shape: all, or those of the real positions."""
    keep = np.ones(shape, bool)
    if output.valid:
        keep &= spread(np.arange(shape[1]) < vector.arrays[output.valid][:, None], len(shape))
    return keep


def spread(a: np.ndarray, axes: int) -> np.ndarray:
    """Return an array of the leading axes as one that broadcasts over `axes` axes."""
    return a.reshape(*a.shape, *(1,) * (axes - a.ndim))


def worst_of(rows: Iterable[Row]) -> Row:
    """Return the row whose error is the largest part of what is allowed."""
    rows = list(rows)
    return max(
        rows, key=lambda row: row.error / row.allowed if row.allowed else (np.inf if row.error else 0.0)
    )


def check(backend: Backend, dtype="float32", names: Iterable[str] | None = None) -> list[Row]:
    """Return a row for each shipped case, or each of `names`, that a backend computes.

    dtype: of the backend's activations. A case that the backend cannot compute has the error infinity, and
    the exception as its note. Texts and sampling do not depend on a backend: `vectors_text.check_host`.
    """
    from refengine.conformance.vectors.files import shipped
    from refengine.conformance.vectors.replay import REPLAY

    rows = []
    for vector in shipped(names):
        if vector.operation in REPLAY:
            rows.append(check_vector(vector, backend, dtype))
    return rows


def check_vector(vector: Vector, backend: Backend, dtype="float32") -> Row:
    """Return the row of one case."""
    from refengine.conformance.vectors.replay import replay

    try:
        return worst_of(judge(vector, replay(vector, backend, dtype), dtype))
    except Exception as error:  # of a backend that others wrote
        what = " ".join(str(error).split())[:200]
        return Row(vector.operation, vector.name, np.inf, 0.0, f"{type(error).__name__}: {what}")

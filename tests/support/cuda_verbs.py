"""Helpers for tests of the CUDA kernels: two builds, values that both represent, tolerances."""

from __future__ import annotations

import re
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from refengine.backends.cuda.kernel import KERNELS

SLACK = 1e-5  # of sums in float32, over the largest value


@dataclass(frozen=True)
class Build:
    """A way to compile the kernels. `half`: half a unit in the last place of an activation."""

    name: str
    defines: tuple[str, ...]
    dtype: np.dtype
    half: float

    def values(self, seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Return random numbers that an activation can represent exactly."""
        drawn = scale * np.random.default_rng([seed, *shape]).standard_normal(shape)
        return drawn.astype(self.dtype)

    def near(self, actual, expected, whole=None, products: bool = False, what: str = "") -> None:
        """Check that each value is the expected one, rounded once to an activation, up to float32 sums.

        whole: the size of each value if nothing cancelled. products: the terms were rounded too.
        """
        actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
        assert actual.shape == expected.shape, f"{what}: shape {actual.shape} for {expected.shape}"
        if not expected.size:
            return
        whole = np.abs(expected if whole is None else whole)
        allowed = 1.01 * self.half * np.abs(expected) + SLACK * max(1.0, whole.max())
        if products:
            allowed = allowed + 2 * self.half * whole
        excess = np.abs(actual - expected) / allowed
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        assert excess[at] <= 1, f"{what}: {actual[at]} at {at}, expected {expected[at]}: {self.name}"


FLOAT32 = Build("float32", (), np.dtype(np.float32), 2.0**-24)
BFLOAT16 = Build("bfloat16", ("REAL_BF16",), np.dtype(ml_dtypes.bfloat16), 2.0**-8)
on_both = pytest.mark.parametrize("build", [FLOAT32, BFLOAT16], ids=lambda build: build.name)


def build_for(sanitized) -> Build:
    """Return one build for each sanitizer, to compile less: the narrow one if alignment is checked."""
    return BFLOAT16 if sanitized.mode == "address" else FLOAT32


def small(seed: int, *shape: int) -> np.ndarray:
    """Return random float32, in the range of vector weights."""
    return np.random.default_rng([seed, 1, *shape]).standard_normal(shape).astype(np.float32)


def exact(*arrays):
    """Return the same values for the definition."""
    return tuple(np.asarray(a).astype(np.float64) for a in arrays)


def within(device, a: np.ndarray, before: int, after: int):
    """Return `a` on the device as a part of a wider array, the rest of which is NaN."""
    around = [np.full((*a.shape[:-1], width), np.nan, a.dtype) for width in (before, after)]
    wide = device.from_host(np.concatenate([around[0], a, around[1]], axis=-1))
    return wide[..., before : before + a.shape[-1]]


def lengths(seed: int, b: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, length + 1, b).astype(np.int32)


def poisoned(a: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return a [b, l, ..] with NaN at padding."""
    beyond = np.arange(a.shape[1]) >= n[:, None]
    return np.where(beyond.reshape(*beyond.shape, *[1] * (a.ndim - 2)), np.array(np.nan, a.dtype), a)


def constants(file: str) -> dict[str, int]:
    """Return the integers that a kernel file declares constexpr."""
    lines = re.findall(r"^constexpr int ([^;]*);", (KERNELS / file).read_text(), re.MULTILINE)
    return {name: int(value) for line in lines for name, value in re.findall(r"(\w+) = (\d+)\b(?! /)", line)}


def planted(tmp_path, file: str, right: str, wrong: str):
    """Return an emulated device whose kernels have one fault."""
    from tools.cuda.emulator import EmulatedDevice

    for source in KERNELS.iterdir():
        (tmp_path / source.name).write_text(source.read_text())
    text = (KERNELS / file).read_text()
    assert text.count(right) == 1, f"{right!r} is no longer once in {file}"
    (tmp_path / file).write_text(text.replace(right, wrong))
    return EmulatedDevice(kernels=tmp_path)

"""Vectors of packed weights: codes and scales to numbers (`unpack`), numbers to codes and scales (`pack`).

All is exact: the order of float32 multiplications is part of the formats (docs/packed.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

import refengine
from refengine.conformance.vectors import Output, Vector
from refengine.spec import quant
from refengine.spec.arrays import DTYPES
from refengine.spec.quant import Packed

ROWS, COLUMNS = 3, 64
CASES: dict[str, tuple[dict, str]] = {  # what is packed how, and why the case exists
    "nvfp4": ({"kind": "NVFP4", "block": 16}, "the low half of a byte is the even column (trap 8)"),
    "four-over-six": (
        {"kind": "NVFP4", "block": 16, "four_over_six": True},
        "some blocks have their largest element at 4",
    ),
    "w4a8": ({"kind": "NVFP4", "block": 32, "top": quant.TOP_W4A8}, "blocks of 32, and a larger scale_2"),
    "fp8": ({"kind": "FP8"}, "one scale a matrix, which multiplies"),
    "mxfp8": ({"kind": "MXFP8", "block": 32}, "scales are powers of two, stored as exponents + 127"),
}


def numbers(seed: int) -> np.ndarray:
    """Return a matrix [3 64] of bfloat16 numbers, as float32, whose blocks differ much in size."""
    rng = np.random.default_rng([seed, 77])
    w = rng.standard_normal((ROWS, COLUMNS)) * np.repeat(np.exp(rng.normal(0, 2, (ROWS, 4))), 16, axis=1)
    w[1, :16] = 0  # a block of zeros
    return w.astype(DTYPES["BF16"]).astype(np.float32)


def pack(w: np.ndarray, how: dict) -> Packed:
    """Return w as packed by the definition; `how` are the constants of a case."""
    options = {key: value for key, value in how.items() if key != "kind"}
    return {"NVFP4": quant.nvfp4, "FP8": quant.fp8, "MXFP8": quant.mxfp8}[how["kind"]](w, **options)


def parts(packed: Packed) -> dict[str, np.ndarray]:
    """Return codes, scale and, of NVFP4, scale_2 as arrays."""
    out = {"codes": packed.codes, "scale": np.asarray(packed.scale)}
    return out if packed.scale_2 is None else out | {"scale_2": np.asarray(packed.scale_2, np.float32)}


def convert(vector: Vector) -> dict[str, np.ndarray]:
    """Return the outputs of a case of packed weights, by the definition."""
    given = vector.part("in")
    if vector.operation == "pack":
        return parts(pack(given["w"], vector.constants))
    scale_2 = np.float32(given["scale_2"]) if "scale_2" in given else None
    return {"w": Packed(vector.constants["kind"], given["codes"], given["scale"], scale_2).dequantize()}


def packed_cases() -> Iterator[Vector]:
    """Yield the shipped cases: each format packed and unpacked, and a matrix whose scale_2 is 0."""
    for seed, (name, (how, why)) in enumerate(CASES.items()):
        w = numbers(seed)
        yield _case(f"packed/pack-{name}", "pack", why, seed, how, {"w": w})
        kind = {"kind": how["kind"]}
        yield _case(f"packed/unpack-{name}", "unpack", why, seed, kind, parts(pack(w, how)))
    zero = parts(pack(numbers(9), {"kind": "NVFP4"})) | {"scale_2": np.asarray(0, np.float32)}
    yield _case("packed/unpack-zeros", "unpack", "a scale_2 of 0 means zeros", 9, {"kind": "NVFP4"}, zero)


def _case(name: str, operation: str, why: str, seed: int, how: dict, given: dict) -> Vector:
    """Return a vector with its outputs, each of which is exact."""
    vector = Vector(
        name=name,
        operation=operation,
        why=why,
        seed=seed,
        sources={"out": f"refengine {refengine.__version__}, the definition"},
        constants=how,
        arrays={f"in.{key}": np.asarray(a) for key, a in given.items()},
    )
    right = convert(vector)
    outputs = {key: Output(f"out.{key}", 1, exact=True) for key in right}
    return replace(
        vector,
        outputs=outputs,
        arrays=vector.arrays | {f"out.{key}": np.asarray(a) for key, a in right.items()},
    )

"""Kernel files: what a kernel's parameters are, and whether the arguments of a launch are those.

A wrong argument does not fail on a GPU: it is read as whatever bytes it has. So both devices check every
launch against the parameter list in the source.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refengine.backends.cuda.array import DTYPES, DeviceArray
from refengine.spec.config import InputError

KERNELS = Path(__file__).parent / "kernels"
ENTRY = re.compile(r'extern\s+"C"\s+__global__\s+void\b')
SCALARS = {"int": np.int32, "long long": np.int64, "unsigned long long": np.uint64, "float": np.float32}
POINTERS = {  # types that any array of elements of this size may have, and those that stand for one dtype
    "float": ("float32",), "int": ("int32",), "long long": ("int64",), "unsigned char": ("uint8",),
    "unsigned short": ("bfloat16", "float16"), "unsigned": ("float32", "int32"),
    "unsigned long long": ("int64",), "Bf16": ("bfloat16",), "Half": ("float16",),
}  # fmt: skip
Argument = DeviceArray | np.generic | None


class Parameter(NamedTuple):
    """`int*` has pointer=True and type "int"; const and __restrict__ are left out."""

    type: str
    name: str
    pointer: bool


@cache
def signatures(path: Path) -> dict[str, tuple[Parameter, ...]]:
    """Return the parameters of each entry point of a kernel file."""
    return {
        name: tuple(parameter(part) for part in inside.split(",")) if inside else ()
        for name, _, inside in entries(path)
    }


@cache
def launch_bounds(path: Path) -> dict[str, str]:
    """Return the most threads of a block of each entry point, as in its source: `32 * WARPS`."""
    return {name: bounds.split(",")[0] or "1024" for name, bounds, _ in entries(path)}


def entries(path: Path):
    """Yield (name, launch bounds, parameters) of each entry point, as they are written."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL)
    for entry in ENTRY.finditer(text):
        rest, bounds = text[entry.end() :].lstrip(), ""
        if rest.startswith("__launch_bounds__"):
            bounds, rest = parenthesis(rest)
        inside, _ = parenthesis(rest)
        yield rest.split("(")[0].strip(), bounds, inside


def parenthesis(text: str) -> tuple[str, str]:
    """Return the text inside the first pair of parentheses, and the text after it."""
    opened = text.index("(")
    closed = closing(text, opened)
    return text[opened + 1 : closed].strip(), text[closed + 1 :]


def closing(text: str, at: int) -> int:
    """Return where the parenthesis that opens at `at` closes."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError("a parenthesis is not closed")


def parameter(text: str) -> Parameter:
    """Return a parameter of a C declaration, such as `const int* n`."""
    words = re.sub(r"\b(const|__restrict__|struct)\b", " ", text).replace("*", " * ").split()
    pointer = "*" in words
    kind = [word for word in words[:-1] if word != "*"]
    if kind[-1:] == ["int"] and len(kind) > 1:  # `unsigned int`, `long long int`
        kind.pop()
    return Parameter(" ".join(kind), words[-1], pointer)


def allowed(kind: str, defines: tuple[str, ...]) -> tuple[str, ...]:
    """Return the dtypes of an array that may be passed where the source has `kind*`."""
    if kind == "Real":
        return ("bfloat16",) if "REAL_BF16" in defines else ("float32",)
    if kind == "Kept":
        kept = {"KEPT_F32": "float32", "KEPT_BF16": "bfloat16", "KEPT_F8": "uint8"}
        return tuple(kept[d] for d in defines if d in kept) or allowed("Real", defines)
    if kind == "State":
        return ("float16",) if "STATE_F16" in defines else ("float32",)
    if kind == "Word":
        size = int(next(d for d in defines if d.startswith("BYTES_")).removeprefix("BYTES_"))
        return tuple(name for name, dtype in DTYPES.items() if dtype.itemsize == size)
    return POINTERS[kind]


def check(
    file: str,
    kernel: str,
    args: tuple[Argument, ...],
    defines: tuple[str, ...],
    device,
    kernels: Path = KERNELS,
) -> None:
    """Raise TypeError where `args` are not the kernel's parameters. None is a null pointer."""
    known = signatures(kernels / f"{file}.cu")
    if kernel not in known:
        raise TypeError(f"{file}.cu has no kernel {kernel}; it has {', '.join(known)}")
    parameters = known[kernel]
    if len(args) != len(parameters):
        raise TypeError(f"kernel {kernel} takes {len(parameters)} arguments, and was given {len(args)}")
    for argument, wanted in zip(args, parameters, strict=True):
        wrong = mismatch(argument, wanted, defines, device)
        if wrong:
            raise TypeError(f"kernel {kernel}, argument {wanted.name}: {wrong}")


def mismatch(argument: Argument, wanted: Parameter, defines: tuple[str, ...], device) -> str | None:
    """Return why one argument does not fit, or None."""
    if not wanted.pointer:
        scalar = SCALARS.get(wanted.type)
        if scalar is None:
            return f"a kernel does not take a {wanted.type}"
        return None if type(argument) is scalar else f"np.{scalar.__name__} expected, not {argument!r}"
    if argument is None:
        return None
    if not isinstance(argument, DeviceArray):
        return f"an array on the device expected, not {type(argument).__name__}"
    if argument.device is not device:
        return "the array is on another device"
    dtypes = allowed(wanted.type, defines)
    return None if argument.dtype in dtypes else f"{' or '.join(dtypes)} expected, not {argument.dtype}"


def check_sizes(kernel: str, grid: tuple[int, ...], block: tuple[int, ...], shared: int, limit: int) -> None:
    """Raise InputError where no device would launch this; `limit`: most bytes of shared memory of a block.

    Grids grow with the batch and the length of a call, so that a user may ask for too large a one.
    """
    for what, sizes, most, advice in (
        ("grid", grid, (2**31 - 1, 65535, 65535), ": fewer sequences at a time fit"),
        ("block", block, (1024, 1024, 64), ""),
    ):
        if not 1 <= len(sizes) <= 3 or any(not 1 <= s <= m for s, m in zip(sizes, most, strict=False)):
            raise InputError(f"kernel {kernel}: the {what} {sizes} is not within {most}{advice}")
    if np.prod(block) > 1024:
        raise InputError(f"kernel {kernel}: a block of {np.prod(block)} threads, and 1024 are the most")
    if shared > limit:
        raise InputError(f"kernel {kernel}: {shared} bytes of shared memory, and a block has at most {limit}")

"""Arrays of NumPy and of PyTorch alike, as the compiled loops see them: an address, and the kind of a number.

The loops do not know which library made an array, so the program of a model and its steps serve both.
"""

from __future__ import annotations

import numpy as np

from refengine.backends.cpu.interface import filled

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}  # as structures.h numbers them


def address(a) -> int | None:
    """Return where the numbers of an array or a tensor begin; None of None."""
    if a is None:
        return None
    return a.__array_interface__["data"][0] if isinstance(a, np.ndarray) else a.data_ptr()


def kind_of(a) -> int | None:
    """Return the number of an array's dtype among KINDS, or None if it has none."""
    return KINDS.get(str(a.dtype).removeprefix("torch."))


def in_order(a) -> bool:
    """Return whether the numbers of an array or a tensor lie in order without gaps."""
    return a.flags.c_contiguous if isinstance(a, np.ndarray) else a.is_contiguous()


def matrix(a):
    """Return the structure Matrix of a weight; raises TypeError for one that the loops cannot read."""
    kind = kind_of(a)
    if kind is None or not in_order(a):
        raise TypeError(f"the compiled loops read no weight of {a.dtype}")
    return filled("Matrix", address(a), kind)

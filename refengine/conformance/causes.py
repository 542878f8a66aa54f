"""Find the known mistakes that give a wrong verb's results from the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refengine.conformance.candidate import Bench
from refengine.conformance.checks import Check
from refengine.conformance.mistakes import MISTAKES
from refengine.conformance.traces.watch import VERB_OF
from refengine.conformance.vectors import eps
from refengine.spec.config import Config
from refengine.spec.ops import numpy_backend

SAME, OTHER = 64, 256  # roundings of float32, over the largest value: below is the same, above is another
MOST = 3  # mistakes that are worth naming


def causes(check: Check, backend: Bench, arguments: dict[str, Any], verb: str) -> list[str]:
    """Return the mistakes that reproduce what a verb over NumPy arrays returned, at most three, or none.

    arguments: of the check, as it failed; two more seeds of its case are looked at.
    """
    case = arguments.get("case")
    if case is None:
        return []
    calls: list[tuple[tuple, Any]] = []
    for seed in (0, 1, 2):
        watched = replace(backend.ops, **{verb: kept(getattr(backend.ops, verb), calls)})
        try:
            check(replace(backend, ops=watched), **arguments | {"case": replace(case, seed=case.seed + seed)})
        except Exception:  # it is known to fail
            continue
    right = getattr(numpy_backend(backend.dtype).ops, verb)
    found = []
    for mistake in MISTAKES:
        if VERB_OF.get(mistake.step) == verb and str(mistake) not in found:
            try:
                if reproduces(mistake.wrong, right, case.cfg, calls):
                    found.append(str(mistake))
            except Exception:  # of arguments that the mistake cannot read, as another library's
                continue
    return found if len(found) <= MOST else []


def kept(verb: Callable, calls: list) -> Callable:
    """Return the verb; it keeps copies of its arguments and results."""

    def call(*args, **how):
        given = tuple(a.copy() if isinstance(a, np.ndarray) else a for a in args)
        result = verb(*args, **how)
        calls.append((given, result))
        return result

    return call


def reproduces(wrong: Callable, right: Callable, cfg: Config, calls: list) -> bool:
    """Return whether a mistake gives the results of all calls, and the right verb does not."""
    differs = False
    for args, result in calls:
        mine, mistaken = numbers(result), numbers(wrong(right, cfg, *args))
        if apart(mine, mistaken) > SAME:
            return False
        differs = differs or apart(numbers(right(*args)), mistaken) > OTHER
    return differs


def numbers(result) -> list[np.ndarray]:
    """Return the arrays of a result in float64; a cache is left out."""
    parts = result if isinstance(result, tuple) else (result,)
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if any(np.iscomplexobj(part) for part in arrays):
        raise TypeError("complex numbers are no activations")
    return [np.asarray(part, np.float64) for part in arrays]


def apart(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Return the largest difference, over the largest value or 1, in roundings of float32.

    It is infinite where a number is not finite: such results identify no mistake.
    """
    if [a.shape for a in some] != [b.shape for b in others]:
        return np.inf
    if not all(np.isfinite(a).all() for a in (*some, *others)):
        return np.inf
    worst = [
        np.abs(a - b).max(initial=0) / max(1.0, np.abs(b).max(initial=0))
        for a, b in zip(some, others, strict=True)
    ]
    return float(max(worst, default=np.inf)) / eps(np.float32)

"""The shipped vectors for tests: a case by its name, and the outputs of a backend for it."""

from __future__ import annotations

from refengine.conformance.vectors import Vector as Case
from refengine.conformance.vectors import judge_output
from refengine.conformance.vectors.files import shipped_vector
from refengine.conformance.vectors.replay import replay as answers_of


def Vector(name: str) -> Case:
    """Return a case of the shipped set."""
    return shipped_vector(name)


def replay(vector: Case, backend) -> float:
    """Return the worst error of a backend's outputs; raise AssertionError if rounding does not explain it.

    They are compared with the definition and with the outputs of transformers.
    """
    answers, worst = answers_of(vector, backend, backend.dtype), 0.0
    for against, dtype in (("out", backend.dtype), ("transformers", "float32")):
        for name in vector.outputs:
            if against == "out" or f"transformers.{name}" in vector.arrays:
                row = judge_output(vector, name, answers.get(name), dtype, against)
                assert row.passed, f"{vector.name}, {name}, against {against}: {row}"
                worst = max(worst, row.error)
    return worst

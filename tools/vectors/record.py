"""Write the shipped vectors: refengine/conformance/data/vectors, with recordings of transformers.

    python -m tools.vectors.record            write the cases that change by more than rounding
    python -m tools.vectors.record --check    write nothing; name the cases that would change

Needs `pip install -e '.[test]'`. Right outputs are the definition's in float64; recordings are transformers'.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import click
import numpy as np

from refengine.conformance import witness
from refengine.conformance.vectors import Vector, judge_output
from refengine.conformance.vectors import files as vectors_files
from refengine.conformance.vectors.packed import packed_cases
from refengine.conformance.vectors.shipped import all_cases
from refengine.conformance.vectors.text import samplings, texts
from refengine.spec.config import InputError

ONCE = ("model/plain", "model/limited", "model/every-expert")  # recorded at once only, to keep the set small


def recorded() -> Iterator[Vector]:
    """Yield every case of the set; where transformers has the operation, with its outputs in float32."""
    for vector in all_cases():
        found = witness.record(vector)
        if found is None:
            yield vector
            continue
        arrays, what = found
        if vector.name in ONCE:
            del arrays["one_by_one"]
        arrays = {f"transformers.{key}": a.astype(np.float32) for key, a in arrays.items()}
        sources = vector.sources | {"transformers": f"{witness.version()} {what}, float32"}
        vector = replace(vector, arrays=vector.arrays | arrays, sources=sources)
        for key in found[0]:
            row = judge_output(vector, key, found[0][key], "float32")
            assert row.passed and not row.note, f"transformers and the definition differ: {row}"
        yield vector
    yield from samplings()
    yield from packed_cases()
    yield from texts()


def same(new: Vector) -> bool:
    """Return whether the shipped case is this one, to the rounding of another machine."""
    try:
        old = vectors_files.shipped_vector(new.name)
    except InputError:
        return False
    if any(getattr(old, key) != getattr(new, key) for key in ("texts", "config", "constants", "outputs")):
        return False
    if old.arrays.keys() != new.arrays.keys():
        return False
    return all(close(old.arrays[key], new.arrays[key], key) for key in new.arrays)


def close(a: np.ndarray, b: np.ndarray, key: str) -> bool:
    """Return whether two arrays are equal up to the rounding of the dtype they were computed in."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind == "i" or not key.startswith(("out.", "transformers.", "margin")):
        return a.tobytes() == b.tobytes()
    return np.allclose(a, b, rtol=1e-5, atol=1e-5 if key.startswith("transformers.") else 1e-10)


def main(check: bool) -> int:
    """Write the set, or check it; return the exit code."""
    made = list(recorded())
    changed = [vector.name for vector in made if not same(vector)]
    if not check:
        kept = [v if v.name in changed else vectors_files.shipped_vector(v.name) for v in made]
        vectors_files.write(vectors_files.SHIPPED, kept)
    print(f"{'would change' if check else 'written'}: {', '.join(changed) or 'nothing'}")
    return int(check and bool(changed))


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--check", is_flag=True, help="Write nothing; fail if something would change.")
def command(check: bool):
    """Run as a program."""
    sys.exit(main(check))


if __name__ == "__main__":
    command()

"""Write the tables of docs/accuracy.md: rms errors of engines against float64, on the same seeded cases.

    python -m tools.write.accuracy            print them
    python -m tools.write.accuracy --write    put them into docs/accuracy.md, between its marks

Takes some minutes. Engines that are not installed have no column.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from refengine.conformance import accuracy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"
START, END = "<!-- measured -->\n", "<!-- /measured -->"


def row(*cells) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def shown(value: float | None) -> str:
    """Return an error to two digits; a dash where there is none."""
    return "–" if value is None else f"{value:.1e}"


def operations() -> str:
    """Return the table of operations and models."""
    engines = accuracy.columns()
    names = [engine.name for engine in engines]
    lines = [row("operation", "cases", *names), row(*["---"] * (2 + len(names)))]
    for name, count, errors in accuracy.table(engines):
        print(name, file=sys.stderr)
        lines.append(row(name, count, *map(shown, errors)))
    return "\n".join(["**1. Relative rms error against float64, geometric mean over the cases**", "", *lines])


def by_case() -> str:
    """Return the table of models as transformers initialises them, a line a model, and its summary."""
    compared = []
    for case in accuracy.initialised_cases():
        print(f"initialised model {case.seed}", file=sys.stderr)
        compared.append(accuracy.compare(case))
    head = ("seed", "latent", "torch", "transformers", "ratio", "other experts: torch", "transformers")
    lines = [row(*head), row(*["---"] * len(head))]
    for c in compared:
        latent = c.case.moe_latent_size or "none"
        errors = (f"{c.ours:.1e}", f"{c.theirs:.1e}", f"{c.ratio:.2f}")
        lines.append(row(c.case.seed, latent, *errors, c.our_flips, c.their_flips))
    ratios = np.array([c.ratio for c in compared])
    same = [c.ratio for c in compared if not c.our_flips + c.their_flips]
    mean = float(np.exp(np.log(ratios).mean()))
    summary = (
        f"Geometric mean of the ratios over {len(ratios)} models: {mean:.2f} (bar: 1.1). "
        f"Largest ratio where neither\nchose another expert than float64 ({len(same)} models): "
        f"{max(same):.2f} (bar: 1.5); over all: {ratios.max():.2f}."
    )
    title = "**2. Models as transformers initialises them, bfloat16 weights and activations, a line a model**"
    return "\n".join([title, "", *lines, "", summary])


def where() -> str:
    """Return the versions of the engines and the machine, in a sentence."""
    found = []
    for package in ("numpy", "torch", "transformers", "llama-cpp-python", "mlx", "mlx-lm"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return f"Measured with {', '.join(found)}, on {platform.machine()}."


def main(write: bool) -> None:
    """Print the tables, or put them into the page."""
    tables = "\n\n".join([where(), operations(), by_case()]) + "\n"
    if not write:
        print(tables)
        return
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    PAGE.write_text(f"{before}{START}\n{tables}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"written: {PAGE.name}")


if __name__ == "__main__":
    main(write="--write" in sys.argv[1:])

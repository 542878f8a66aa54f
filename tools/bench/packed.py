"""Measure what quantizing costs the embedded model: loss, KL and top-1 against BF16, for each recipe.

    python -m tools.bench.packed [STORIES]

Stories are told by the generator with a seed that training does not use. KL is of the distribution after each
token, in nats; top-1 is how often the most likely token is the same. Writes a Markdown table to stdout.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import numpy as np

import refengine
from refengine.checkpoint import Checkpoint
from refengine.quantize import quantize, recipe_of
from refengine.spec.sample import log_probs
from tools.tiny.stories import tell

SEED = 20_261_129
ROWS = {
    "NVFP4, every linear": ("nvfp4", False),
    "NVFP4, every linear, four over six": ("nvfp4", True),
    "W4A8, every linear": ("w4a8", False),
    "Nano": ("nano", False),
    "Super": ("super", False),
    "Ultra": ("ultra", False),
    "Lightning": ("lightning", False),
    "FP8, every linear": ("fp8", False),
    "MXFP8, every linear": ("mxfp8", False),
}


def distributions(model: str | Path, texts: list[list[int]]) -> list[np.ndarray]:
    """Return log-probabilities [tokens v] of each text, by the model on the NumPy backend."""
    with refengine.load(model) as engine:
        return [log_probs(engine.logits(ids).astype(np.float64)) for ids in texts]


def main(count: int) -> None:
    """Print the table."""
    rng = random.Random(SEED)
    with refengine.load("tiny") as engine:
        texts = [[*engine.ids(tell(rng).text), 2] for _ in range(count)]
    exact = distributions("tiny", texts)

    def loss(found) -> float:
        pairs = list(zip(found, texts, strict=True))
        nats = [p[np.arange(len(ids) - 1), ids[1:]] for p, ids in pairs]
        return -float(np.concatenate(nats).mean())

    size = sum(at.nbytes for at in Checkpoint.open("tiny").stored.values())
    print(f"{sum(map(len, texts))} tokens; BF16: {size / 1e6:.2f} MB, loss {loss(exact):.4f}\n")
    print("| recipe | MB | loss | KL | top-1 |\n|---|---|---|---|---|")
    for name, (recipe, four_over_six) in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            quantize("tiny", Path(folder) / "out", recipe_of(recipe, four_over_six))
            nbytes = sum(at.nbytes for at in Checkpoint.open(Path(folder) / "out").stored.values())
            found = distributions(Path(folder) / "out", texts)
        kl = np.concatenate([(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(exact, found, strict=True)])
        same = np.concatenate([p.argmax(1) == q.argmax(1) for p, q in zip(exact, found, strict=True)])
        change = loss(found) - loss(exact)
        print(
            f"| {name} | {nbytes / 1e6:.2f} | {change:+.4f} | {kl.mean():.4f} | {same.mean():.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)

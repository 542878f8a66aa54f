"""Record the scales that NVIDIA's modelopt finds on the embedded model, in tests/quantize/vectors.

    python -m tools.write.modelopt_calibration tests/quantize/vectors/calibration.json

with nvidia-modelopt 0.47, transformers 5.23, accelerate and torch in the environment. The model computes in
float32, without transformers' clamp of dt, and reads STORIES of the texts of `refengine quantize
--calibrate`, in the same pieces; modelopt calibrates (the largest magnitudes), exports, and the single scales
are read from its files. The experts of a layer have one scale for `up` and one for `down`, which is checked,
and recorded under the name of expert 0.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from refengine.quantize.calibrate import PIECE, pieces
from refengine.quantize.texts import TEXTS
from tools.write.modelopt_recipes import export

STORIES = 4
ENDS = (".input_scale", ".k_scale", ".v_scale")
RECIPES = ("nvfp4", "super")


def tokens() -> list[list[int]]:
    """Return the pieces that both sides read."""
    import refengine

    with refengine.load("tiny") as engine:
        return pieces([engine.tokenizer.encode(text) for text in TEXTS[:STORIES]], PIECE)


def scales(recipe: str, cut: list[list[int]], dtype: str) -> dict[str, float]:
    """Return the single scales that modelopt writes by a recipe, by name."""
    from safetensors.torch import load_file

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as out:
        export(recipe, cut, dtype, out)
        for path in Path(out).glob("*.safetensors"):
            found |= {key: float(each) for key, each in load_file(path).items() if key.endswith(ENDS)}
    return of_layers(found)


def of_layers(found: dict[str, float]) -> dict[str, float]:
    """Return the scales with those of expert 0 alone, which every other expert of its layer must have."""
    out = {}
    for name, value in found.items():
        before, experts, rest = name.partition(".experts.")
        first = f"{before}.experts.0.{rest.partition('.')[2]}" if experts else name
        assert out.setdefault(first, value) == value, name
    return out


def record(out: Path, dtype: str = "float32") -> None:
    """Write the file."""
    cut = tokens()
    found = {recipe: dict(sorted(scales(recipe, cut, dtype).items())) for recipe in RECIPES}
    out.write_text(json.dumps({"stories": STORIES, "scales": found}, indent=1) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]), *sys.argv[2:])

"""Packed weights equal those of NVIDIA's modelopt byte by byte: recorded, and live if it is installed.

Up to rounding, so do the scales of calibration (`python -m tools.write.modelopt_calibration`).
"""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refengine.checkpoint import Checkpoint
from refengine.quantize import recipe_of
from refengine.quantize.calibrate import calibrate
from refengine.quantize.texts import TEXTS
from refengine.quantize.write import calibrated, plan
from refengine.spec.quant import TOP_W4A8, fp8, mxfp8, nvfp4, rounded_inputs
from refengine.spec.tensors import table
from tools.write.modelopt_recipes import CONFIGS, compare

FOLDER = Path(__file__).parent / "vectors"
VECTORS = sorted(set(FOLDER.glob("*.npz")) - set(FOLDER.glob("inputs-*")))
PACK = {
    "nvfp4": nvfp4,
    "four_over_six": lambda w: nvfp4(w, four_over_six=True),
    "w4a8": lambda w: nvfp4(w, block=32, top=TOP_W4A8),
    "fp8": fp8,
    "mxfp8": mxfp8,
}


def check(layout, weight, tensors, matrix):
    """Compare our packed weight and its matrix with those of modelopt for the same numbers."""
    with np.errstate(invalid="ignore"):
        packed = PACK[layout](weight)
        found = packed.dequantize()
    ours = {"weight": packed.codes, "weight_scale": packed.scale, "weight_scale_2": packed.scale_2}
    for key, value in tensors.items():
        assert np.array_equal(np.ravel(ours[key]), np.ravel(value)), key
    assert np.array_equal(found.view(np.uint32), matrix.view(np.uint32))


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_recorded_bytes_are_ours(path):
    with np.load(path) as file:
        arrays = dict(file)
    tensors = {key[4:]: value for key, value in arrays.items() if key.startswith("out.weight")}
    layout = path.stem.partition("-")[0]
    check(layout, arrays["in.weight"].view(ml_dtypes.bfloat16), tensors, arrays["out.matrix"])


def test_there_are_vectors_of_every_layout():
    assert {path.stem.partition("-")[0] for path in VECTORS} == set(PACK) and len(VECTORS) == 21
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 200_000


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_inputs_are_packed_as_modelopt_packs_them(kind):
    with np.load(FOLDER / f"inputs-{kind}.npz") as file:
        x, scale, wanted = (file[key] for key in ("in.x", "in.scale", "out.x"))
    weight = replace(PACK[kind](x), input_scale=np.float32(scale))
    assert np.array_equal(rounded_inputs(x, weight), wanted)


@pytest.fixture(scope="module")
def calibration():
    """Return modelopt's scales, and the largest magnitudes that calibration finds on the same text."""
    recorded = json.loads((FOLDER / "calibration.json").read_text())
    with Checkpoint.open("tiny") as checkpoint:
        return recorded["scales"], calibrate(checkpoint, TEXTS[: recorded["stories"]])


@pytest.mark.parametrize("recipe", ["nvfp4", "super"])
def test_the_scales_of_inputs_and_of_the_cache_are_those_that_modelopt_finds(recipe, calibration):
    scales, largest = calibration
    with Checkpoint.open("tiny") as checkpoint:
        jobs = [calibrated(job, recipe_of(recipe), largest) for job in plan(checkpoint, recipe_of(recipe))]
    ours = {name: value for job in jobs for name, value in job.scales.items()}
    experts = {name for name in ours if ".experts." in name}
    first = {name for name in experts if ".experts.0." in name}
    assert scales[recipe].keys() == ours.keys() - (experts - first)
    for name, value in scales[recipe].items():
        assert ours[name] == pytest.approx(value, rel=1e-4), name
    for name in experts:  # one scale for all experts of a layer
        before, _, rest = name.partition(".experts.")
        assert ours[name] == ours[f"{before}.experts.0.{rest.partition('.')[2]}"], name


@pytest.mark.slow
def test_every_matrix_of_the_embedded_model_is_modelopts():
    """Live: pip install nvidia-modelopt==0.47.0 torch==2.13.0."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("modelopt")
    from tools.write.modelopt_vectors import layouts

    checkpoint = Checkpoint.open("tiny")
    rows = [row for row in table(checkpoint.config) if row.precision != "small"]
    for row in rows:
        weight = checkpoint.read(row.name)
        given = torch.from_numpy(weight.view(np.uint16).copy()).view(torch.bfloat16)
        for layout, tensors in layouts(given):
            matrix = tensors.pop("found")
            check(layout, weight, tensors, matrix)


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", CONFIGS)
def test_every_byte_of_a_copy_is_modelopts(recipe):
    """Live, as modelopt exports the embedded model: pip install accelerate and transformers 5 too."""
    for library in ("torch", "transformers", "accelerate", "modelopt"):
        pytest.importorskip(library)
    matrices, _, wrong = compare(recipe)
    assert matrices and not wrong

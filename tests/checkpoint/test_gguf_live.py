"""llama.cpp, if installed, makes files of the embedded model that we read, and reads the files that we write.

Set LLAMA_CPP to its source (with convert_hf_to_gguf.py) and LLAMA_CPP_BIN to the folder of llama-quantize and
llama-completion. Without it, the recorded files of test_gguf.py are tested.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import refengine
from refengine.checkpoint import Checkpoint
from refengine.checkpoint.write import write
from refengine.convert import KINDS, convert
from refengine.quantize import quantize, recipe_of
from refengine.spec.tensors import table
from tests.support.vocabularies import TINY
from tools.write.gguf_files import converted, original, quantized

SOURCE, PROGRAMS = (Path(os.environ.get(name, "")) for name in ("LLAMA_CPP", "LLAMA_CPP_BIN"))
THERE = (SOURCE / "convert_hf_to_gguf.py").is_file() and (PROGRAMS / "llama-quantize").is_file()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not THERE, reason="LLAMA_CPP and LLAMA_CPP_BIN do not name llama.cpp"),
]
IDS = [1, 30, 40, 50, 60, 70, 80, 90, 100, 40, 30]
TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
    "MXFP4_MOE", "TQ1_0", "TQ2_0", "IQ3_S",
)  # fmt: skip
STORY = "Once upon a time"


def logits(model, **how) -> np.ndarray:
    with refengine.load(model, backend="numpy", **how) as engine:
        return engine.logits(IDS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict[str, Path]:
    """Return the embedded model as the converter writes it."""
    folder = tmp_path_factory.mktemp("wide")
    return {kind: converted(SOURCE, TINY, folder / f"{kind}.gguf", kind) for kind in ("f32", "bf16")}


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_its_file_has_the_tensors_of_the_directory(kind, wide):
    ours, theirs = Checkpoint.open(wide[kind]), Checkpoint.open("tiny")
    for row in table(theirs.config):
        a, b = (each.read(row.name).astype(np.float32) for each in (ours, theirs))
        np.testing.assert_array_equal(a, b, err_msg=row.name)
    # the chunk of the scan is not in the file, and its order of summing not the same
    np.testing.assert_allclose(logits(wide[kind]), logits("tiny"), atol=1e-4)


@pytest.mark.parametrize("kind", TYPES)
def test_its_packed_file_computes_what_its_matrices_compute(kind, wide, tmp_path):
    path = quantized(PROGRAMS, wide["f32"], tmp_path / "x.gguf", kind)
    checkpoint = Checkpoint.open(path)

    def values(row):
        weight = checkpoint.read(row.name)
        return weight if isinstance(weight, np.ndarray) else weight.dequantize()

    write(tmp_path / "wide", checkpoint.config, values, dtype="F32")
    found, exact = (logits(each, dtype="float64") for each in (path, tmp_path / "wide"))
    np.testing.assert_array_equal(found, exact)


def test_its_file_of_native_fp4_has_the_weights_of_the_directory(tmp_path):
    """In a model whose widths are multiples of 64, as the converter requires."""
    sizes = {"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64}
    quantize(original(tmp_path / "model", "experts", **sizes), tmp_path / "fp4", recipe_of("ultra"))
    path = converted(SOURCE, tmp_path / "fp4", tmp_path / "x.gguf", "bf16")
    ours, theirs = Checkpoint.open(path), Checkpoint.open(tmp_path / "fp4")
    kinds = set()
    for row in table(theirs.config):
        a, b = (each.read(row.name) for each in (ours, theirs))
        a, b = (each if isinstance(each, np.ndarray) else each.dequantize() for each in (a, b))
        kinds.add(ours.stored[row.name].dtype)
        near = theirs.stored[row.name].dtype == "FP8"  # which the converter rounds to bfloat16
        np.testing.assert_allclose(a, b.astype(np.float32), rtol=2**-8 if near else 0, err_msg=row.name)
    assert "NVFP4" in kinds


def completion(path: Path, count: int) -> str:
    """Return the greedy continuation of llama.cpp."""
    how = [
        "-m",
        path,
        "-p",
        STORY,
        "-n",
        count,
        "--temp",
        "0",
        "-no-cnv",
        "-t",
        "2",
        "--no-warmup",
        "-s",
        "1",
    ]
    program = PROGRAMS / "llama-completion"
    done = subprocess.run(
        [str(each) for each in [program, *how]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_it_continues_our_file(kind, tmp_path):
    """With the same greedy text if the weights are those of the model, else with some text."""
    path = tmp_path / "x.gguf"
    convert("tiny", path, kind)
    with refengine.load(path, backend="numpy") as engine:
        ours = engine.complete(STORY, max_tokens=60, temperature=0)
    found = completion(path, 60)
    if kind in ("f32", "bf16"):
        assert ours in found
    else:
        assert len(found) > 100

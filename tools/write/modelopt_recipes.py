"""Compare `refengine quantize` with NVIDIA's modelopt on the embedded model, recipe by recipe, byte by byte.

    python -m tools.write.modelopt_recipes [RECIPE ...]      all of CONFIGS by default

with nvidia-modelopt 0.47, transformers 5.23, accelerate and torch in the environment. modelopt packs the
model in bfloat16 and exports it; the codes and scales of each matrix, and each plain tensor, are compared
with those of our copy, and a row of a Markdown table is printed. `nvfp4+` is nvfp4 with --four-over-six.
modelopt leaves out the prediction head. On a CPU its one Triton kernel, of recipes that search for scales,
is replaced by the same arithmetic in torch.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.locate import locate
from refengine.conformance.traces.hooks import release
from refengine.quantize import quantize, recipe_of
from refengine.spec.quant import Packed
from refengine.spec.tensors import table

NVIDIA = "models/nvidia/NVIDIA-Nemotron-3"
CONFIGS = {  # the same recipe in modelopt: the name of a preset, or a file in its wheel
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4+": "NVFP4_FOUR_OVER_SIX_CFG",
    "w4a16": "W4A16_NVFP4_CFG",
    "w4a8": "W4A8_NVFP4_FP8_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "super": f"{NVIDIA}-Super-120B-A12B-BF16/ptq/nvfp4-max-calib.yaml",
    "ultra": f"{NVIDIA}-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6.yaml",
    "lightning": f"{NVIDIA}.5-Lightning-30B-A3B-BF16/ptq/w4a16_nvfp4_4o6.yaml",
}
IDS = [[1, 5, 9, 12, 7, 3]]  # read while modelopt calibrates; weights and their scales do not depend on it


def config(recipe: str) -> dict[str, Any]:
    """Return modelopt's own form of a recipe."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe

    name = CONFIGS[recipe]
    return load_recipe(name).quantize.model_dump() if name.endswith(".yaml") else getattr(mtq, name)


def export(recipe: str, pieces: list[list[int]], dtype: str, out: str | Path) -> None:
    """Write the embedded model into a directory, packed by modelopt, which calibrates on pieces of text."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization import tensor_quant
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        locate("tiny"),
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    release(model)

    def read(each) -> None:
        with torch.no_grad():
            for ids in pieces:
                each(torch.tensor([ids]))

    tensor_quant.StaticBlockwiseFP4FakeQuantFunction.forward = staticmethod(rounded)
    with redirect_stdout(sys.stderr):
        mtq.quantize(model, config(recipe), read)
        export_hf_checkpoint(model, export_dir=str(out))


def rounded(ctx, x, amax, global_amax, quantize_block_scales=True, top=448, out_dtype=None, _=False):
    """Return x as it is after NVFP4 with a given largest element of each block: modelopt's Triton kernel."""
    import torch
    from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

    scale = amax.float() / 6
    if quantize_block_scales:
        scale = scaled_e4m3_impl(scale, global_amax.float() * (448 / top) / 6)
    blocks, scale = x.float().reshape(scale.numel(), -1), scale.reshape(-1, 1)
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    below, above = (torch.bucketize(blocks.abs() / scale, borders, right=right) for right in (False, True))
    found = blocks.sign() * values[torch.where(above % 2 == 0, above, below)] * scale  # ties to even codes
    found = torch.where(torch.isfinite(scale) & (scale > 0), found, torch.zeros(()))
    return found.reshape(x.shape).to(out_dtype or x.dtype)


def differences(ours: Checkpoint, theirs: Checkpoint) -> tuple[int, int, list[str]]:
    """Return how many matrices are packed, the bytes compared, and the names of tensors that differ."""
    matrices, size, wrong = 0, 0, []
    for row in table(ours.config):
        if row.block.startswith("mtp."):
            continue
        a, b = ours.read(row.name), theirs.read(row.name)
        size += a.nbytes
        if isinstance(a, Packed) and isinstance(b, Packed):
            matrices += 1
            same = (a.kind, a.scale_2) == (b.kind, b.scale_2)
            same = same and np.array_equal(a.codes, b.codes) and np.array_equal(a.scale, b.scale)
        else:
            same = type(a) is type(b) and a.dtype == b.dtype and a.tobytes() == b.tobytes()
        wrong += [] if same else [row.name]
    return matrices, size, wrong


def compare(recipe: str) -> tuple[int, int, list[str]]:
    """Return the `differences` of our copy of the embedded model from modelopt's by a recipe of CONFIGS."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        quantize("tiny", ours, recipe_of(recipe.removesuffix("+"), recipe.endswith("+")))
        export(recipe, IDS, "bfloat16", theirs)
        return differences(Checkpoint.open(ours), Checkpoint.open(theirs))


def main(recipes: list[str]) -> None:
    """Print the table."""
    print("| recipe | packed matrices | bytes compared | tensors that differ |\n|---|---|---|---|")
    for recipe in recipes:
        matrices, size, wrong = compare(recipe)
        print(f"| {recipe} | {matrices} | {size:,} | {len(wrong)} {' '.join(wrong[:3])}|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CONFIGS))

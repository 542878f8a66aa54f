"""Record what NVIDIA's modelopt makes of a few small matrices, in every layout: tests/quantize/vectors/*.npz.

    python -m tools.write.modelopt_vectors OUT [EXPORT]

with nvidia-modelopt 0.47 and torch in the environment, and what `modelopt_recipes` needs for EXPORT: a copy
by the recipe `ultra`, made here by default. Each file has `in.weight`, the bytes of codes and scales, and
`out.matrix`: float32, as modelopt dequantizes. The matrices are corners of the embedded model's, and two that
have zeros, ties and tiny blocks in them; of four over six it is a whole matrix. The files `inputs-*` have
activations `in.x`, an `in.scale` of inputs, and `out.x`, which modelopt makes of them.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.write.modelopt_recipes import IDS, export

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "refengine" / "models" / "tiny" / "model.safetensors"
NAMES = {  # of a file -> tensor
    "experts": "backbone.layers.3.mixer.experts.7.up_proj.weight",
    "mamba": "backbone.layers.0.mixer.in_proj.weight",
    "attention": "backbone.layers.1.mixer.q_proj.weight",
}
SIZE = (16, 64)
WHOLE = "backbone.layers.3.mixer.experts.4.down_proj"  # in three blocks a scale of four over six is a tie


def matrices() -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, matrix in bfloat16, as uint16) of each file."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(TINY)
    for name, tensor in NAMES.items():
        yield name, tensors[tensor][: SIZE[0], : SIZE[1]].contiguous().view(torch.uint16).numpy()
    rng = np.random.default_rng(0)
    odd = rng.standard_normal(SIZE).astype(np.float32)
    odd[0], odd[1, :32], odd[2] = 0, 0, odd[2] * 2.0**-18  # zero rows and blocks, and tiny ones
    odd[3, ::2] *= 64
    yield "zeros", (odd.view(np.uint32) >> 16).astype(np.uint16)
    ties = np.resize(np.array([6, 0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5], np.float32), SIZE)
    yield "ties", (ties.view(np.uint32) >> 16).astype(np.uint16)


def layouts(weight: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (layout, tensors) as modelopt makes them of a torch matrix in bfloat16."""
    import torch
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    def bits(x):
        return x.view(torch.uint8).numpy() if x.dtype != torch.float32 else x.numpy()

    for layout, block, scale_2 in (("nvfp4", 16, None), ("w4a8", 32, weight.abs().amax().float() / 448.0)):
        packed, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), block, None, scale_2)
        found = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: block})
        tensors = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}
        yield layout, {key: bits(each) for key, each in tensors.items()} | {"found": found.numpy()}
    scale = weight.abs().amax().float() / 448.0
    codes = (weight / scale).to(torch.float8_e4m3fn)
    found = FP8QTensor(weight.shape, weight.dtype, codes).dequantize(torch.float32, scale=scale)
    yield "fp8", {"weight": bits(codes), "weight_scale": bits(scale), "found": found.numpy()}
    packed, scale = MXFP8QTensor.quantize(weight.clone())
    found = packed.dequantize(torch.float32, scale=scale)
    yield (
        "mxfp8",
        {"weight": bits(packed._quantized_data), "weight_scale": bits(scale), "found": found.numpy()},
    )


def inputs() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield (format, arrays) of activations that are packed by a given scale; some are beyond its range."""
    import torch
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    x = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    x[0, :16], x[1, 16:32] = 0, x[1, 16:32] * 2.0**-8
    given, amax = torch.from_numpy(x), torch.tensor(np.abs(x).max())
    scale = amax * 0.7 / (6 * 448)
    packed, scales, _ = NVFP4QTensor.quantize(given.clone(), 16, None, scale)
    found = packed.dequantize(torch.float32, scale=scales, double_scale=scale, block_sizes={-1: 16})
    yield "nvfp4", {"in.x": x, "in.scale": scale.numpy(), "out.x": found.numpy()}
    scale = amax / 448
    packed, _ = FP8QTensor.quantize(given.clone(), scale)
    found = packed.dequantize(torch.float32, scale=scale)
    yield "fp8", {"in.x": x, "in.scale": scale.numpy(), "out.x": found.numpy()}


def four_over_six(exported: Path) -> dict[str, np.ndarray]:
    """Return the arrays of one matrix of a copy by four over six."""
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from safetensors.torch import load_file

    weight, found = load_file(TINY)[f"{WHOLE}.weight"], load_file(exported / "model.safetensors")
    codes, scale, scale_2 = (found[f"{WHOLE}.{end}"] for end in ("weight", "weight_scale", "weight_scale_2"))
    packed = NVFP4QTensor(weight.shape, torch.float32, codes)
    matrix = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    return {
        "in.weight": weight.view(torch.uint16).numpy(),
        "out.matrix": matrix.numpy(),
        "out.weight": codes.numpy(),
        "out.weight_scale": scale.view(torch.uint8).numpy(),
        "out.weight_scale_2": scale_2.numpy(),
    }


def record(out: Path, exported: Path | None = None) -> None:
    """Write a file for each matrix and layout, and for inputs."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    for name, raw in matrices():
        for layout, tensors in layouts(torch.from_numpy(raw.copy()).view(torch.bfloat16)):
            found = tensors.pop("found")
            arrays = {f"out.{key}": value for key, value in tensors.items()}
            np.savez_compressed(
                out / f"{layout}-{name}.npz", **{"in.weight": raw, "out.matrix": found}, **arrays
            )
    for name, arrays in inputs():
        np.savez_compressed(out / f"inputs-{name}.npz", **arrays)
    with tempfile.TemporaryDirectory() as folder:
        if exported is None:
            exported = Path(folder)
            export("ultra", IDS, "bfloat16", exported)
        np.savez_compressed(out / "four_over_six-expert.npz", **four_over_six(exported))


if __name__ == "__main__":
    record(*map(Path, sys.argv[1:]))

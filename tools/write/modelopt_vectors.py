"""Record what NVIDIA's modelopt makes of a few small matrices, in every layout: tests/quantize/vectors/*.npz.

    python -m tools.write.modelopt_vectors OUT       with nvidia-modelopt 0.47 and torch in the environment

Each file has `in.weight`, the bytes of codes and scales, and `out.matrix`: float32, as modelopt dequantizes.
The matrices are corners of the embedded model's, and two that have zeros, ties and tiny blocks in them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "refengine" / "models" / "tiny" / "model.safetensors"
NAMES = {  # of a file -> tensor
    "experts": "backbone.layers.3.mixer.experts.7.up_proj.weight",
    "mamba": "backbone.layers.0.mixer.in_proj.weight",
    "attention": "backbone.layers.1.mixer.q_proj.weight",
}
SIZE = (16, 64)


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


def record(out: Path) -> None:
    """Write a file for each matrix and layout."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    for name, raw in matrices():
        for layout, tensors in layouts(torch.from_numpy(raw.copy()).view(torch.bfloat16)):
            found = tensors.pop("found")
            arrays = {f"out.{key}": value for key, value in tensors.items()}
            np.savez_compressed(
                out / f"{layout}-{name}.npz", **{"in.weight": raw, "out.matrix": found}, **arrays
            )


if __name__ == "__main__":
    record(Path(sys.argv[1]))

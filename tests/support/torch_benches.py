"""The torch backend under test: each precision, each way of multiplying, and CUDA if there is a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from refengine.spec.arrays import DTYPES
from refengine.spec.ops import DEFINITION, numpy_backend
from refengine.spec.tensors import Group
from tests.support.benches import Bench, bench

torch = pytest.importorskip("torch", reason="the torch backend needs: pip install 'refengine[torch]'")
from refengine.backends.pytorch import torch_backend  # noqa: E402

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TRUTH = bench("definition-float64", numpy_backend(np.float64, ops=DEFINITION), np.float64)


@dataclass(frozen=True)
class Torch:
    """The dtypes of a bench: weights in `dtype`, activations in `compute`."""

    name: str
    dtype: str
    compute: str | None = None
    device: str = "cpu"
    resident: bool = True
    compiled: bool = True

    def __call__(self) -> Bench:
        return built(self)

    @property
    def eps(self) -> float:
        """Return the rounding of the coarsest dtype of the computation.

        float16 is only a dtype of stored weights. So is bfloat16 if activations are float32.
        """
        exact = self.dtype == "float16" or self.compute == "float32"
        return EPS["float32" if exact else self.dtype]

    def near(self, actual, expected, terms: int, what: str = "", stretch: float = 1.0) -> None:
        """Check that `actual` equals `expected`, a sum of `terms` products, up to the rounding of this bench.

        stretch: the factor by which a division enlarged the rounding of its numerator.
        """
        actual, expected = (np.asarray(a).astype(np.float64) for a in (actual, expected))
        assert actual.shape == expected.shape, f"{what}: shape {actual.shape} for {expected.shape}"
        worst = np.abs(actual - expected).max(initial=0) / max(1.0, np.abs(expected).max(initial=0))
        allowed = stretch * 4 * self.eps * max(1, terms) ** 0.5  # numerics.tolerance knows no bfloat16
        assert worst <= allowed, f"{what}: off by {worst:.3g}, where {allowed:.3g} is allowed by {self.name}"

    def rounded(self, a: np.ndarray) -> np.ndarray:
        """Return `a` in float64, rounded as the weights and inputs of this bench."""
        kind = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.dtype(self.dtype)
        return np.asarray(a).astype(np.float32).astype(kind).astype(np.float64)


@lru_cache
def built(how: Torch) -> Bench:
    choices = dict(resident=how.resident, compute=how.compute, compiled=how.compiled)
    backend = torch_backend(how.dtype, how.device, **choices)
    active = backend.new_state("M", _SMALLEST, 1).tail.dtype
    dtype = np.dtype(ml_dtypes.bfloat16) if active == torch.bfloat16 else np.dtype(np.float32)
    return bench(how.name, backend, dtype)


class _SMALLEST:
    conv_kernel, conv_dim, mamba_num_heads, mamba_head_dim, ssm_state_size = 2, 1, 1, 1, 1


cpu = [
    Torch("torch-float32", "float32"),
    Torch("torch-float32-plain", "float32", compiled=False),
    Torch("torch-float32-mapped", "float32", resident=False),
    Torch("torch-bfloat16", "bfloat16", "float32"),
    Torch("torch-bfloat16-plain", "bfloat16", "float32", compiled=False),
    Torch("torch-bfloat16-units", "bfloat16", "bfloat16"),
    Torch("torch-float16", "float16"),
]
cuda = [Torch("cuda-float32", "float32", device="cuda"), Torch("cuda-bfloat16", "bfloat16", device="cuda")]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
ALL = [pytest.param(how, id=how.name) for how in cpu] + [
    pytest.param(how, id=how.name, marks=[pytest.mark.gpu, needs_cuda]) for how in cuda
]
EXACT = [p for p in ALL if p.values[0].dtype == "float32"]
on = partial(pytest.mark.parametrize, "how")
on_all, on_exact = on(ALL), on(EXACT)
# For laws that refengine.conformance has too, and checks in float32 in the default tier.
on_others = on(
    [
        pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.thorough]) if p in EXACT else p
        for p in ALL
    ]
)

# A line for tests/support/benches.py: BENCHES |= TORCH puts these under every law of the project.
TORCH = {how.name: how for how in cpu if how.dtype == "float32"}


def values(how, seed, *shape, scale=1.0):
    """Return random values that both sides represent exactly."""
    return how.rounded(scale * np.random.default_rng([seed, *shape]).standard_normal(shape))


def placed(how, *matrices, name="w", precision="matrix"):
    group = Group("layers.0", True, name, [SimpleNamespace(precision=precision)])
    disk = DTYPES[
        "F32" if precision == "small" else {"bfloat16": "BF16", "float16": "F16"}.get(how.dtype, "F32")
    ]
    return how().place(group, [m.astype(disk) for m in matrices])


def small(how, a):
    return placed(how, a, precision="small")


def lengths(seed, b, l):
    return np.random.default_rng(seed).integers(0, l + 1, b)

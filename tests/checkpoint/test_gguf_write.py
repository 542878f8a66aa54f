"""Tensors of a GGUF file of NVFP4 are packed once, and each has the factor of its blocks."""

import numpy as np
import pytest

from refengine.checkpoint.gguf import write
from refengine.conformance.cases import Case
from refengine.spec.quant import Packed, nvfp4

WIDE = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)


@pytest.mark.parametrize(
    "value",
    [
        WIDE,
        WIDE.astype(np.float16),
        WIDE * np.float32(1e9),
        np.zeros_like(WIDE),
        np.full_like(WIDE, 1e-44),  # its factor would be 0
        nvfp4(WIDE),
        Packed("NVFP4", *(getattr(nvfp4(WIDE), name) for name in ("codes", "scale")), np.float32(0)),
        nvfp4(WIDE, block=32),
    ],
    ids=range(8),
)
def test_the_factor_of_a_matrix_is_that_of_its_blocks(value):
    assert write.factor(value) == write.in_nvfp4(value).scale_2


def test_each_matrix_is_packed_once(monkeypatch):
    case, packed = Case(layers="E", hidden_size=64, moe_latent_size=None), []

    def counted(w, **how):
        packed.append(w.tobytes())
        return nvfp4(w, **how)

    monkeypatch.setattr(write, "nvfp4", counted)
    for piece in write.pieces(case.cfg, case.read, "nvfp4"):
        assert piece.data().nbytes == piece.nbytes
    assert packed and len(packed) == len(set(packed))

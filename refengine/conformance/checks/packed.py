"""Checks of packed weights, against float64 with the dequantized matrices.

A backend that takes no packed weights gets them in bfloat16 (`spec.ops.placed_by`), and is compared with
that matrix. Sizes are multiples of 32, the largest block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from refengine.conformance.cases import Case, agree, random_tensors
from refengine.conformance.checks import check, drawing, one_of, readings
from refengine.conformance.checks.experts import hiddens
from refengine.spec import quant
from refengine.spec.arrays import DTYPES, Weight
from refengine.spec.config import Config
from refengine.spec.moe import Routing
from refengine.spec.quant import Packed

PACK: dict[str, Callable[[np.ndarray], Packed]] = {
    "NVFP4": quant.nvfp4,
    "four over six": partial(quant.nvfp4, four_over_six=True),
    "W4A8": partial(quant.nvfp4, block=32, top=quant.TOP_W4A8),
    "FP8": quant.fp8,
    "MXFP8": quant.mxfp8,
    "a scale_2 of 0": lambda w: replace(quant.nvfp4(w), scale_2=np.float32(0)),
}


def kinds(layers: str) -> Callable[[], dict]:
    """Return a function that returns strategies: a case of these layers, and a kind of packed weights."""
    return one_of(drawing(layers, hidden_size=64, moe_latent_size=32, head_dim=32), kind=tuple(PACK))


class PackedCase:
    """The first mixer and the output layer of a case, all of their matrices packed in one kind."""

    def __init__(self, backend, case: Case, kind: str):
        self.backend, self.case, self.kind = backend, case, kind
        widths: dict[str, Any] = dict(moe_intermediate_size=96, intermediate_size=160)
        widths["moe_shared_expert_intermediate_size"] = 64
        self.cfg: Config = replace(case.cfg, **widths)

    def read(self, name: str) -> Weight:
        """Return a tensor: a projection or the output layer packed, another as the file has it."""
        return tensor(self.cfg, self.case.seed, self.kind, name)

    def exact(self, key: str) -> np.ndarray:
        """Return the float64 matrix that a packed weight of the mixer, or "lm_head.weight", stands for."""
        weight = self.read(key if key == "lm_head.weight" else f"backbone.layers.0.mixer.{key}")
        assert isinstance(weight, Packed)
        dtype = np.float32 if self.backend.packed else DTYPES["BF16"]
        return weight.dequantize(dtype).astype(np.float64)

    @cached_property
    def weights(self) -> dict:
        """Return the weights of the mixer, as the backend places them."""
        return self.backend.weights(self.cfg, self.read)

    def hiddens(self) -> np.ndarray:
        """Return what the layer reads: h [b l d]."""
        return hiddens(self.backend, self.case)


@lru_cache(maxsize=256)
def tensor(cfg: Config, seed: int, kind: str, name: str) -> Weight:
    """Return a tensor of a `PackedCase`."""
    plain = random_tensors(cfg, seed)[name]
    return PACK[kind](plain) if name.endswith(("_proj.weight", "lm_head.weight")) else plain


@check("packed-weights", kinds("-"), uses=("linear",))
def a_packed_matrix_times_unit_vectors_is_the_matrix(backend, case, kind):
    """Check each element: which half of a byte is which column, and which scale multiplies it."""
    of = PackedCase(backend, case, kind)
    w = of.exact("up_proj.weight")
    y = backend.ops.linear(backend.give(np.eye(w.shape[1])[None]), of.weights["up_proj.weight"])
    agree(backend.result(y)[0], w.T, backend.dtype, 1)


@check("packed-weights", kinds("-"), uses=("linear",))
def a_packed_matrix_multiplies_as_the_matrix_it_stands_for(backend, case, kind):
    """Check x weight', of several positions and of a single one."""
    of = PackedCase(backend, case, kind)
    w, x = of.exact("up_proj.weight"), of.hiddens()
    for piece in (x, x[:, :1]):
        y = backend.ops.linear(backend.give(piece), of.weights["up_proj.weight"])
        agree(backend.result(y), piece @ w.T, backend.dtype, w.shape[1])


@check("packed-weights", kinds("*"), uses=("linear",), share=0.5)
def three_packed_matrices_are_one_product(backend, case, kind):
    """Check the projection to q | k | v, whose weight is a group of three packed matrices."""
    of = PackedCase(backend, case, kind)
    x = of.hiddens()
    y = backend.ops.linear(backend.give(x), of.weights["qkv_proj"])
    expected = np.concatenate([x @ of.exact(f"{which}_proj.weight").T for which in "qkv"], axis=-1)
    agree(backend.result(y), expected, backend.dtype, x.shape[-1])


@check("packed-weights", kinds("-"), uses=("mlp",), share=0.5)
def a_packed_mlp_is_the_mlp_of_its_matrices(backend, case, kind):
    """Check relu(h up')^2 down'."""
    of = PackedCase(backend, case, kind)
    h, (up, down) = of.hiddens(), (f"{which}_proj.weight" for which in ("up", "down"))
    y = backend.ops.mlp(backend.give(h), of.weights[up], of.weights[down])
    terms = case.hidden_size + of.cfg.intermediate_size
    agree(backend.result(y), readings.mlp(h, of.exact(up), of.exact(down)), backend.dtype, terms)


@check("packed-weights", kinds("-"), uses=("logits",), share=0.5)
def packed_logits_are_those_of_the_matrix(backend, case, kind):
    """Check hidden lm_head'."""
    of = PackedCase(backend, case, kind)
    h = of.hiddens()
    y = backend.ops.logits(backend.give(h), backend.weight(of.cfg, of.read, "lm_head.weight"))
    expected = h @ of.exact("lm_head.weight").T
    agree(backend.result(y, wider=True), expected, backend.dtype, case.hidden_size)


@check("packed-weights", kinds("E"), uses=("experts", "route"))
def packed_experts_are_a_weighted_sum(backend, case, kind):
    """Check the sum over chosen experts, by the routing that the backend itself made."""
    of = PackedCase(backend, case, kind)
    h, w, c = of.hiddens(), of.weights, of.cfg
    u = backend.exact(case.normal(1, case.batch, case.length, c.expert_width))
    routing = backend.ops.route(backend.give(h), w["gate.weight"], w["gate.e_score_correction_bias"], c)
    kept = Routing(*(backend.fetch(a).reshape(*h.shape[:2], -1) for a in routing))
    expected = np.zeros_like(u)
    for b, t, k in np.ndindex(kept.expert.shape):
        e = int(kept.expert[b, t, k])
        up, down = (of.exact(f"experts.{e}.{which}_proj.weight") for which in ("up", "down"))
        expected[b, t] += float(kept.weight[b, t, k]) * readings.mlp(u[b, t], up, down)
    terms = c.expert_width + c.num_experts_per_tok * c.moe_intermediate_size
    y = backend.ops.experts(backend.give(u), w["experts"], routing)
    agree(backend.result(y), expected, backend.dtype, terms)

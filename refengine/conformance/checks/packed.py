"""Checks of packed weights, against float64 with the dequantized matrices.

A backend that takes no packed weights gets them in bfloat16 (`spec.ops.placed_by`), and is compared with
that matrix. Sizes are multiples of 32, the largest block of NVIDIA's kinds; of GGUF types with longer blocks,
multiples of 256.
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
from refengine.spec.arrays import DTYPES, PackedWeight, Weight
from refengine.spec.blocks import FORMATS, Blocks
from refengine.spec.config import Config
from refengine.spec.moe import Routing

HALVES = {  # where a block has float16 numbers; of other types: at 0
    "q4_1": (0, 2), "q5_1": (0, 2), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2),
    "q6_k": (208,), "mxfp4": (), "nvfp4": (),
}  # fmt: skip


def gguf_blocks(kind: str, w: np.ndarray) -> Blocks:
    """Return random blocks of a GGUF type: a matrix of the shape and the spread of w, seeded by w."""
    form, rng = FORMATS[kind], np.random.default_rng(np.ravel(w)[:16].view(np.uint16))
    raw = rng.integers(0, 256, (w.size // form.columns, form.nbytes), np.uint8)
    steps = {at: rng.uniform(-1.5, 1.5, len(raw)) for at in HALVES.get(kind, (0,))}
    exponents = rng.integers(-1, 2, len(raw))

    def of_size(size: float) -> Blocks:
        for at, step in steps.items():
            raw[:, at : at + 2] = (size * step).astype(np.float16)[:, None].view(np.uint8)
        if kind == "mxfp4":
            raw[:, 0] = quant.BIAS + round(np.log2(size)) + exponents
        return Blocks(form, raw.reshape(len(w), -1), np.float32(size) if kind == "nvfp4" else None)

    return of_size(float(np.std(w.astype(np.float64)) / np.std(of_size(1.0).dequantize())))


GGUF = {f"GGUF {kind}": kind for kind in FORMATS}
PACK: dict[str, Callable[[np.ndarray], PackedWeight]] = {
    "NVFP4": quant.nvfp4,
    "four over six": partial(quant.nvfp4, four_over_six=True),
    "W4A8": partial(quant.nvfp4, block=32, top=quant.TOP_W4A8),
    "FP8": quant.fp8,
    "MXFP8": quant.mxfp8,
    "a scale_2 of 0": lambda w: replace(quant.nvfp4(w), scale_2=np.float32(0)),
    **{name: partial(gguf_blocks, kind) for name, kind in GGUF.items()},
}
EACH = tuple({"case": Case(layers="-", batch=1, length=3, hidden_size=64), "kind": kind} for kind in PACK)


def kinds(layers: str) -> Callable[[], dict]:
    """Return a function that returns strategies: a case of these layers, and a kind of packed weights."""
    return one_of(drawing(layers, hidden_size=64, moe_latent_size=32, head_dim=32), kind=tuple(PACK))


class PackedCase:
    """The first mixer and the output layer of a case, all of their matrices packed in one kind."""

    def __init__(self, backend, case: Case, kind: str):
        widths: dict[str, Any] = dict(moe_intermediate_size=96, intermediate_size=160)
        widths["moe_shared_expert_intermediate_size"] = 64
        if kind in GGUF and FORMATS[GGUF[kind]].columns > 32:
            case = replace(case, hidden_size=256, moe_latent_size=512, head_dim=256)
            widths = dict(moe_intermediate_size=256, intermediate_size=512)
            widths["moe_shared_expert_intermediate_size"] = 768
        self.backend, self.case, self.kind = backend, case, kind
        self.cfg: Config = replace(case.cfg, **widths)
        self.matrices: dict[str, np.ndarray] = {}

    def read(self, name: str) -> Weight:
        """Return a tensor: a projection or the output layer packed, another as the file has it."""
        return tensor(self.cfg, self.case.seed, self.kind, name)

    def exact(self, key: str) -> np.ndarray:
        """Return the float64 matrix that a packed weight of the mixer, or "lm_head.weight", stands for."""
        if key not in self.matrices:
            weight = self.read(key if key == "lm_head.weight" else f"backbone.layers.0.mixer.{key}")
            assert isinstance(weight, PackedWeight)
            dtype = np.float32 if self.backend.packed else DTYPES["BF16"]
            self.matrices[key] = weight.dequantize(dtype).astype(np.float64)
        return self.matrices[key]

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


@check("packed-weights", kinds("-"), uses=("linear",), examples=EACH, share=0.5)
def a_packed_matrix_times_unit_vectors_is_the_matrix(backend, case, kind):
    """Check each element, in each kind: which bits are which column's, and which scale multiplies them."""
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
    terms = of.cfg.hidden_size + of.cfg.intermediate_size
    agree(backend.result(y), readings.mlp(h, of.exact(up), of.exact(down)), backend.dtype, terms)


@check("packed-weights", kinds("-"), uses=("logits",), share=0.5)
def packed_logits_are_those_of_the_matrix(backend, case, kind):
    """Check hidden lm_head'."""
    of = PackedCase(backend, case, kind)
    h = of.hiddens()
    y = backend.ops.logits(backend.give(h), backend.weight(of.cfg, of.read, "lm_head.weight"))
    expected = h @ of.exact("lm_head.weight").T
    agree(backend.result(y, wider=True), expected, backend.dtype, of.cfg.hidden_size)


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

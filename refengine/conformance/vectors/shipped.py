"""The cases of the shipped set: sizes, seeds, and why each exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from refengine.conformance.cases import Case
from refengine.conformance.vectors import Vector
from refengine.conformance.vectors.make import MARGIN, make

SMALL = Case(layers="M", seed=11, length=9, n_groups=2, heads_per_group=3, chunk_size=5)
SHORT = replace(SMALL, length=3)
MOE = replace(SMALL, layers="E")
GROUPED: dict[str, Any] = {"n_group": 3, "n_routed_experts": 12}
ODD: dict[str, Any] = {
    "layer_norm_epsilon": 3e-3,
    "routed_scaling_factor": 0.7,
}  # constants that no release has
EYE = Case(
    layers="M",
    seed=0,
    batch=1,
    length=3,
    n_groups=1,
    heads_per_group=1,
    mamba_head_dim=1,
    ssm_state_size=1,
    conv_kernel=2,
    hidden_size=2,
    num_experts_per_tok=3,
    n_routed_experts=4,
    moe_latent_size=None,
    attention=(2, 1),
    head_dim=1,
)


def from_zero(given, weights):
    """Begin from an empty state, with steps far below 0.001."""
    given["S"][:] = 0
    given["dt"] -= np.float32(7)


def scan_by_eye(given, weights):
    """Halve the state at each step: softplus(0) = ln 2, and A = -1."""
    given |= {key: np.ones_like(a) for key, a in given.items()}
    given["x"][0, :, 0, 0], given["dt"][:], given["S"][:] = (1, 0, 2), 0, 0
    weights |= {name: np.zeros_like(a) if "D" not in name else np.ones_like(a) for name, a in weights.items()}


def conv_by_eye(given, weights):
    """Mix two values of three channels with whole numbers."""
    given["x"][:], given["tail"][:] = [[[1, 0, -1], [2, 0, 0], [0, 1, 0]]], [[[0, 1, 2]]]
    for name, a in weights.items():
        a[...] = 0 if name.endswith("bias") else [[[1, 2]]] * 3


def gate_by_eye(given, weights):
    """Gate two channels by 1 and -1, and by 0 and 1."""
    given["y"][:], given["z"][:] = [[[1, 1], [3, 4], [0, 1]]], [[[1, -1], [1, 1], [0, 1]]]
    for a in weights.values():
        a[...] = 1


def attention_by_eye(given, weights):
    """Look up one of two values by one number; the query 0 takes their mean."""
    for key, a in given.items():
        a[...] = 0 if key in ("k_before", "v_before") else 1
    given["k_before"], given["v_before"] = (given[key][:, :0] for key in ("k_before", "v_before"))
    given["q"][0, :, 0, 0], given["k"][0, :, 0, 0], given["v"][0, :, 0, 0] = (0, 0, 1), (0, 1, 2), (1, 2, 4)


def tie_by_eye(given, weights):
    """Score experts 0 and 3 alike, for the third place: 0 is chosen."""
    given["h"][:] = [[[1, 0], [0, 1], [0, 0]]]
    for name, a in weights.items():
        a[...] = 0 if name.endswith("bias") else [[0, 0], [2, 1], [2, 0], [0, 0]]


def ties(given, weights):
    """Round inputs and gates to few whole numbers, so that sums are exact and scores often equal."""
    given["h"] = np.clip(np.rint(given["h"]), -2, 2).astype(np.float32)
    for a in weights.values():
        a[...] = np.rint(4 * a.astype(np.float64)) / 4


def repeated(given, weights):
    """Make experts 5 and 7 copies of expert 2."""
    ties(given, weights)
    for a in weights.values():
        a[5], a[7] = a[2], a[2]


CASES: list[tuple] = [
    ("embed/rows", "embed", SHORT, "rows are not scaled"),
    ("linear/in-proj", "linear", SHORT, "x times the transposed matrix, no bias"),
    (
        "linear_pair/eh-proj",
        "linear_pair",
        replace(SHORT, mtp_layers="*E"),
        "the first input meets columns 0 .. d-1",
    ),
    ("logits/lm-head", "logits", SHORT, "no bias, no scale"),
    ("rms_norm/with-delta", "rms_norm", SHORT, "the sum is normalised, and returned too"),
    ("rms_norm/large-eps", "rms_norm", replace(SHORT, seed=12, **ODD), "eps is read from the configuration"),
    ("causal_conv/after-a-tail", "causal_conv", SMALL, "which tap meets which token; SiLU on all channels"),
    (
        "causal_conv/ragged",
        "causal_conv",
        replace(SMALL, seed=13, conv_kernel=3, length=7),
        "the tail after the last real position",
        None,
        True,
    ),
    ("causal_conv/by-eye", "causal_conv", EYE, "values to check by eye", conv_by_eye),
    (
        "ssd_scan/resumed",
        "ssd_scan",
        replace(SMALL, length=17),
        "chunks that do not divide the prompt, after a state that is not zero",
    ),
    (
        "ssd_scan/small-steps",
        "ssd_scan",
        SMALL,
        "steps far below 0.001: dt is not clamped (trap 1)",
        from_zero,
    ),
    (
        "ssd_scan/limited",
        "ssd_scan",
        SMALL,
        "a limit in the config is obeyed",
        None,
        False,
        {"dt_limit": [0.05, 0.4]},
    ),
    (
        "ssd_scan/ragged",
        "ssd_scan",
        replace(SMALL, seed=14, n_groups=1),
        "padding neither decays nor feeds the state",
        None,
        True,
    ),
    ("ssd_scan/by-eye", "ssd_scan", EYE, "values to check by eye", scan_by_eye),
    ("gated_rms_norm/two-groups", "gated_rms_norm", SMALL, "gate before norm, statistics a group (trap 2)"),
    (
        "gated_rms_norm/large-eps",
        "gated_rms_norm",
        replace(SHORT, seed=12, n_groups=8, heads_per_group=1, **ODD),
        "eps is read from the configuration",
    ),
    (
        "gated_rms_norm/by-eye",
        "gated_rms_norm",
        replace(EYE, mamba_head_dim=2),
        "values to check by eye",
        gate_by_eye,
    ),
    (
        "attention/after-a-cache",
        "attention",
        replace(SMALL, layers="*", length=7),
        "which query head reads which key head; keys of before come first",
    ),
    (
        "attention/ragged",
        "attention",
        replace(SMALL, layers="*", seed=12, attention=(5, 1), length=7),
        "padding is not looked up",
        None,
        True,
    ),
    ("attention/by-eye", "attention", replace(EYE, layers="*"), "values to check by eye", attention_by_eye),
    (
        "attention/three-to-one",
        "attention mixer",
        replace(SMALL, layers="*"),
        "which query head reads which key head; no positions",
    ),
    ("route/bias", "route", replace(MOE, seed=15), "the bias chooses and does not weigh; the scale"),
    (
        "route/groups",
        "route",
        replace(MOE, seed=16, **GROUPED),
        "the two best of each group decide which groups stay",
    ),
    (
        "route/not-normalised",
        "route",
        replace(MOE, norm_topk_prob=False, num_experts_per_tok=1, seed=17),
        "weights are the scores times the scale",
    ),
    (
        "route/tie",
        "route",
        replace(EYE, layers="E"),
        "values to check by eye: of equal scores the lower index is chosen",
        tie_by_eye,
    ),
    (
        "route/ties",
        "route",
        replace(MOE, seed=18, length=17),
        "copies of an expert: the lowest of them are chosen",
        repeated,
    ),
    (
        "route/tied-groups",
        "route",
        replace(MOE, seed=19, length=17, **GROUPED),
        "of equal groups the lower is kept",
        ties,
    ),
    (
        "experts/weighted-sum",
        "experts",
        replace(MOE, seed=15, length=5),
        "relu squared, no gate; the weight comes after both matrices",
    ),
    (
        "experts/latent",
        "experts mixer",
        MOE,
        "the router and the shared expert read the full width, the others the latent",
    ),
    ("experts/plain", "experts mixer", replace(MOE, moe_latent_size=None, seed=12), "no latent projections"),
    ("mlp/two-matrices", "mlp", replace(SMALL, layers="-", seed=12), "relu squared, and no gate"),
    ("mlp/relu2", "mlp mixer", replace(SMALL, layers="-"), "relu squared, and no gate"),
    ("mamba2/two-groups", "mamba2 mixer", SMALL, "three heads a group: which head reads which group"),
    (
        "mamba2/eight-groups",
        "mamba2 mixer",
        replace(SMALL, n_groups=8, heads_per_group=1, mamba_head_dim=3),
        "groups of one head",
    ),
    (
        "model/latent",
        "model",
        Case(layers="ME*E", seed=8, length=13, heads_per_group=1, n_routed_experts=6),
        "every layer kind of Super and Ultra; the prompt is no multiple of the chunk",
    ),
    (
        "model/plain",
        "model",
        Case(
            layers="EM*",
            seed=2,
            length=14,
            moe_latent_size=None,
            n_groups=8,
            heads_per_group=1,
            mamba_head_dim=3,
            chunk_size=4,
            conv_kernel=3,
            n_routed_experts=6,
        ),
        "Nano: experts at full width, eight groups",
    ),
    (
        "model/dense",
        "model",
        Case(layers="MM--*-", seed=3, length=12, n_groups=1),
        "a dense hybrid with runs of one kind, one group",
    ),
    (
        "model/limited",
        "model",
        Case(layers="E*", seed=4, length=11, n_group=3, norm_topk_prob=False, tied=True),
        "experts chosen within groups, weights not normalised, tied embeddings",
    ),
    (
        "model/every-expert",
        "model",
        Case(
            layers="ME*-",
            seed=5,
            length=11,
            heads_per_group=1,
            n_routed_experts=6,
            num_experts_per_tok=6,
            **ODD,
        ),
        "no choice of experts, so any dtype can be judged; odd constants",
    ),
    (
        "prediction_head/latent",
        "prediction head",
        Case(layers="M", mtp_layers="*E", seed=6, length=9, n_routed_experts=6),
        "the embedding comes first (trap 7); RMSNorm at the end",
    ),
    (
        "state/commit",
        "commit",
        Case(layers="M*-", seed=7, batch=3, length=12, n_groups=1),
        "guesses are read, and some of them kept",
    ),
    (
        "state/slots",
        "slots",
        Case(layers="M*-", seed=8, batch=3, length=12, n_groups=1),
        "sequences move between slots",
    ),
]


def all_cases() -> Iterator[Vector]:
    """Yield the vectors of the shipped set that arrays hold, without recordings."""
    for name, operation, case, why, *rest in CASES:
        options: list[Any] = [*rest, *[None, False, {}][len(rest) :]]
        vector = make(name, operation, case, why, options[0], options[1], **options[2])
        assert "margin" not in vector.arrays or vector.arrays["margin"].min() > MARGIN, name
        yield vector

"""Making vectors: inputs and weights from a seed, right outputs by the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import refengine
from refengine.conformance.cases import Case, terms
from refengine.conformance.truth import router_margin
from refengine.conformance.vectors import Output, Vector
from refengine.conformance.vectors.replay import MIXER_OF, replay
from refengine.spec.arrays import heads
from refengine.spec.config import Config
from refengine.spec.norm import rms
from refengine.spec.numerics import silu
from refengine.spec.ops import DEFINITION, numpy_backend
from refengine.spec.scan import time_steps
from refengine.spec.tensors import table

LARGE_SUM = 50.0  # a sum of dt A so large doubles the error that a scan is allowed
MARGIN = 1e-4  # a case whose router is nearer to a tie than this is drawn again
SCAN, MIXER, ALL = ".A_log .D .dt_bias", ".mixer.", "."
SOURCE = "refengine {version}, the definition in float64"


@dataclass(frozen=True)
class Plan:
    """States one operation's cases.

    inputs  a function of the case: its input arrays
    needs   parts of the names of the weights it reads
    terms   a function of configuration and length: the products that one output value is a sum of
    """

    inputs: Callable[[Case], dict[str, np.ndarray]]
    needs: str
    terms: Callable[[Config, int], int]
    layers: str = "M"


def activations(**shapes) -> Callable[[Case], dict[str, np.ndarray]]:
    """Return a function that draws inputs of these shapes, each given as a function of the configuration."""

    def inputs(case: Case) -> dict[str, np.ndarray]:
        return {
            name: case.normal(i, case.batch, *shape(case.cfg, case.length)).astype(np.float32)
            for i, (name, shape) in enumerate(shapes.items())
        }

    return inputs


def stream(c: Config, l: int) -> tuple[int, ...]:
    """Return the shape of an activation without the batch."""
    return l, c.hidden_size


def inner(c: Config, l: int) -> tuple[int, ...]:
    """Return the shape inside a Mamba layer."""
    return l, c.mamba_inner


def groups(c: Config, l: int) -> tuple[int, ...]:
    """Return the shape of B and C."""
    return l, c.n_groups, c.ssm_state_size


def keys(c: Config, l: int) -> tuple[int, ...]:
    """Return the shape of keys and values."""
    return l, c.num_key_value_heads, c.head_dim


def before(c: Config, l: int) -> tuple[int, ...]:
    """Return the shape of five keys or values that were read before."""
    return keys(c, 5)


def prompt(case: Case) -> dict[str, np.ndarray]:
    """Return ids, the real lengths of a ragged batch, and a next token for each row."""
    return {"ids": case.ids, "lengths": real_lengths(case), "next": case.ids[:, -1] // 2}


def real_lengths(case: Case) -> np.ndarray:
    """Return lengths of which no row is empty, the first row full and the others shorter."""
    return np.array([case.length, *range(case.length // 2, 0, -3)][: case.batch])


def head_inputs(case: Case) -> dict[str, np.ndarray]:
    """Return hidden states, the ids one position further, and a guess for each row."""
    h = case.normal(0, case.batch, case.length, case.hidden_size).astype(np.float32)
    return {"h": h, "next_ids": case.ids, "guess": case.ids[:, 0]}


def commit_inputs(case: Case) -> dict[str, np.ndarray]:
    """Return a prompt, four guesses for each row, how many of them are kept, and a next token."""
    guess = case.rng(5).integers(0, case.cfg.vocab_size, (case.batch, 4))
    return {
        "ids": case.ids,
        "guess": guess,
        "counts": np.array([2, 0, 4][: case.batch]),
        "next": guess[:, :1],
    }


def slot_inputs(case: Case) -> dict[str, np.ndarray]:
    """Return prompts, and which rows are filled with copies of which others."""
    after = case.rng(5).integers(0, case.cfg.vocab_size, (case.batch, 1))
    given = {"ids": case.ids, "lengths": real_lengths(case), "next": after}
    return given | {"rows": np.array([0, 2]), "order": np.array([2, 1])}


PLANS = {
    "embed": Plan(lambda case: {"ids": case.ids}, "embeddings", lambda c, l: 1),
    "linear": Plan(activations(x=stream), "in_proj", lambda c, l: c.hidden_size),
    "linear_pair": Plan(activations(x=stream, y=stream), "eh_proj", lambda c, l: 2 * c.hidden_size),
    "rms_norm": Plan(activations(x=stream, delta=stream), "layers.0.norm", lambda c, l: c.hidden_size),
    "causal_conv": Plan(
        activations(x=lambda c, l: (l, c.conv_dim), tail=lambda c, l: (c.conv_kernel - 1, c.conv_dim)),
        "conv1d",
        lambda c, l: c.conv_kernel + 1,
    ),
    "ssd_scan": Plan(
        activations(
            x=lambda c, l: (l, c.mamba_num_heads, c.mamba_head_dim),
            dt=lambda c, l: (l, c.mamba_num_heads),
            B=groups,
            C=groups,
            S=lambda c, l: (c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size),
        ),
        SCAN,
        lambda c, l: l + c.ssm_state_size + 1,
    ),
    "gated_rms_norm": Plan(
        activations(y=inner, z=inner), "mixer.norm", lambda c, l: c.mamba_inner // c.n_groups
    ),
    "attention": Plan(
        activations(
            q=lambda c, l: (l, c.num_attention_heads, c.head_dim),
            k=keys,
            v=keys,
            k_before=before,
            v_before=before,
        ),
        "",
        lambda c, l: c.head_dim + l + 5,
        "*",
    ),
    "route": Plan(activations(h=stream), ".gate.", lambda c, l: c.hidden_size, "E"),
    "experts": Plan(
        activations(h=stream, u=lambda c, l: (l, c.expert_width)),
        ".gate. .experts.",
        lambda c, l: c.hidden_size + c.expert_width + c.moe_intermediate_size + c.num_experts_per_tok,
        "E",
    ),
    "mlp": Plan(activations(h=stream), MIXER, lambda c, l: c.hidden_size + c.intermediate_size, "-"),
    "logits": Plan(activations(h=stream), "lm_head", lambda c, l: c.hidden_size),
    **{name: Plan(activations(h=stream), MIXER, terms, kind) for name, kind in MIXER_OF.items()},
    "model": Plan(prompt, ALL, terms, "ME*E"),
    "prediction head": Plan(head_inputs, "mtp. embeddings lm_head", terms, "M"),
    "commit": Plan(commit_inputs, ALL, lambda c, l: terms(c, l + 5), "M*-"),
    "slots": Plan(slot_inputs, ALL, lambda c, l: terms(c, l + 1), "M*-"),
}
SAME_AS = {"one_by_one": "logits", "in_pieces": "logits", "ragged": "logits"}  # outputs with one right answer
OPTIONAL = (".k", ".v")  # states that an engine may keep in a form of its own


def make(
    name: str,
    operation: str,
    case: Case,
    why: str,
    change: Callable[[dict, dict], None] | None = None,
    ragged: bool = False,
    **constants,
) -> Vector:
    """Return a vector: the inputs of the operation's plan, and outputs by the definition.

    change(arrays, weights) alters inputs and weights in place, by their names without a prefix. ragged: add
    `lengths`. constants: numbers that the operation takes beside the configuration.
    """
    plan = PLANS[operation]
    given = plan.inputs(case) | ({"lengths": real_lengths(case)} if ragged else {})
    rows = [row for row in table(case.cfg) if any(part in row.name for part in plan.needs.split())]
    weights = {row.name: np.array(case.read(row.name)) for row in rows}
    if change:
        change(given, weights)
    if operation == "model":
        constants = {"cuts": [3, 4, max(5, case.length - 5)]} | constants
    if operation == "ssd_scan":
        constants = {"dt_limit": [0.0, None]} | constants
    vector = Vector(
        name=name,
        operation=operation,
        why=why,
        seed=case.seed,
        sources={"out": SOURCE.format(version=refengine.__version__)},
        config=case.cfg.to_hf(),
        constants=constants,
        arrays={f"in.{key}": a for key, a in given.items()} | weights,
    )
    return with_outputs(vector, plan, case.length)


def with_outputs(vector: Vector, plan: Plan, length: int) -> Vector:
    """Return the vector with its right outputs, how they are judged, and the margins of its routers."""
    shape = next(iter(vector.arrays.values())).shape[:2]
    ops, margins, norms, scans = watched(shape)
    answers = replay(vector, numpy_backend(np.float64, ops=ops), "float64")
    kinds = vector.cfg.mtp_layers if vector.operation == "prediction head" else vector.cfg.layers
    count = kinds.count("E")
    near = np.min(margins[:count], axis=0) if margins and count else None
    arrays, outputs = dict(vector.arrays), {}
    if near is not None and 0 < near.min() < np.inf:  # an exact tie has one right answer
        arrays["margin"] = near
    for key, a in answers.items():
        expected = "out." + SAME_AS.get(key, key)
        if key not in SAME_AS:
            arrays[expected] = a
        elif not key.startswith("ragged"):
            assert np.allclose(a, answers[SAME_AS[key]], rtol=1e-10, atol=1e-12), (vector.name, key)
        outputs[key] = Output(
            expected=expected,
            terms=plan.terms(vector.cfg, length),
            stretch=round(max([1.0, *scans * (key != "tail"), *norms * (key not in ("S", "tail"))]), 3),
            valid="in.lengths" if "in.lengths" in arrays and is_by_position(key, a, shape) else "",
            ties=reach(vector.operation, key) if "margin" in arrays else "",
            layers=max(1, len(kinds)),
            optional=key.endswith(OPTIONAL),
        )
    if vector.operation == "model":  # which positions of a ragged batch are real
        outputs |= {key: replace(outputs[key], valid="") for key in ("logits", "one_by_one", "in_pieces")}
    return replace(vector, arrays=arrays, outputs=outputs)


def is_by_position(name: str, a: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return whether an output has a value for each position of the input; states have none."""
    return a.shape[:2] == shape and not name.startswith("states.") and name not in ("S", "tail")


def reach(operation: str, name: str) -> str:
    """Return how far a near-tie of the router spoils an output."""
    if operation in ("route", "experts", "experts mixer"):
        return "position"
    return "row" if name.startswith("states.") or name in ("after_ragged", "further") else "onwards"


def watched(shape: tuple[int, ...]):
    """Return the definition's verbs; lists of router margins [b l] of calls of this shape, and of stretches.

    A gated norm divides by the size of its group. A scan in chunks takes differences of sums of dt A, which
    have the rounding of the sums.
    """
    margins: list[np.ndarray] = []
    norms: list[float] = []
    scans: list[float] = []

    def route(h, gate, bias, cfg):
        if h.shape[:2] == shape:
            margins.append(router_margin(h, gate, bias, cfg))
        return DEFINITION.route(h, gate, bias, cfg)

    def gated_rms_norm(y, z, weight, eps, groups):
        norms.append(float(1 / rms(heads(y * silu(z), groups), eps).min()))
        return DEFINITION.gated_rms_norm(y, z, weight, eps, groups)

    def ssd_scan(x, dt, A_log, B, C, D, dt_bias, S, lengths, dt_limit, chunk):
        sums = time_steps(dt, dt_bias, lengths, dt_limit)[:, :chunk].sum(axis=1) * np.exp(A_log)
        scans.append(1 + float(sums.max()) / LARGE_SUM)
        return DEFINITION.ssd_scan(x, dt, A_log, B, C, D, dt_bias, S, lengths, dt_limit, chunk)

    ops = replace(DEFINITION, route=route, gated_rms_norm=gated_rms_norm, ssd_scan=ssd_scan)
    return ops, margins, norms, scans


def drawn(operation: str, seed: int, number: int) -> Vector:
    """Return case `number` of a seed: sizes from the menus, drawn again while its router is near a tie."""
    from refengine.conformance.cases import MENUS

    plan = PLANS[operation]
    label = (
        "mixer-" if operation.endswith(" mixer") else f"{operation}-" if folder(operation) == "state" else ""
    )
    for attempt in range(100):
        rng = np.random.default_rng([seed, number, attempt, *operation.encode()])
        sizes: dict[str, Any] = {key: menu[int(rng.integers(len(menu)))] for key, menu in MENUS.items()}
        layers = plan.layers
        if operation in ("model", "commit", "slots"):
            letters = "M*E-" if operation == "model" else "M*-"
            layers = "".join(rng.choice(list(letters), rng.integers(2, 6)))
        case = Case(
            layers=layers,
            mtp_layers="*E" if operation in ("prediction head", "linear_pair") else "",
            seed=int(rng.integers(2**31)),
            batch=3 if operation in ("slots", "commit") else int(rng.integers(1, 4)),
            length=int(rng.integers(9, 24)),
            **sizes,
        )
        vector = make(f"{folder(operation)}/{label}seed-{seed}-{number}", operation, case, f"drawn: {case!r}")
        if "margin" not in vector.arrays or vector.arrays["margin"].min() > MARGIN:
            return vector
    raise AssertionError(f"{operation}: no case far from a tie")


def folder(operation: str) -> str:
    """Return the folder of an operation's files; a mixer shares that of its verb."""
    if operation in ("commit", "slots"):
        return "state"
    return operation.removesuffix(" mixer").replace(" ", "_")

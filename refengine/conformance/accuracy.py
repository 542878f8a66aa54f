"""Accuracy: rms errors of engines against the definition in float64, on the same seeded cases.

Inputs and weights of these cases are bfloat16 numbers, so that every engine reads the same numbers in any
dtype. An error is rms(a - b) / rms(b), where b is the float64 result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from refengine.conformance import peers, witness
from refengine.conformance.cases import Case
from refengine.conformance.truth import truth
from refengine.conformance.vectors import CLOSE, Vector, eps, kept, spread
from refengine.conformance.vectors.make import PLANS, make
from refengine.conformance.vectors.replay import REPLAY, replay
from refengine.spec.arrays import DTYPES
from refengine.spec.config import InputError
from refengine.spec.model import Model
from refengine.spec.ops import DEFINITION, Backend, numpy_backend

SEEDS = range(5)
SIZES: dict[str, Any] = dict(
    batch=1, length=40, hidden_size=64, n_groups=2, heads_per_group=4, mamba_head_dim=16, head_dim=16,
    ssm_state_size=32, chunk_size=16, attention=(8, 2), n_routed_experts=8, num_experts_per_tok=2,
)  # fmt: skip
OPERATIONS = tuple(
    name for name in REPLAY if name not in ("model", "commit", "slots", "embed", "linear_pair")
)
MODELS = ("M-M-M*-M-", "MEM*E", "MEMEM*EME")


@dataclass(frozen=True)
class Column:
    """An engine in one dtype.

    compute(vector) returns its outputs by name, or None where it has no such operation. logits(case) returns
    those of a whole model for the first sequence of a case, l v, and the experts that each router chose, l k;
    of other engines without the experts, and None where an engine cannot compute the model.
    """

    name: str
    compute: Callable[[Vector], dict[str, np.ndarray] | None]
    logits: Callable[[Case], tuple[np.ndarray | None, list[np.ndarray]]]


def columns() -> list[Column]:
    """Return the engines that are installed here."""

    def ours(name: str, compute: str, backend: Callable[[], Backend]) -> Column:
        made = lru_cache(maxsize=1)(backend)
        return Column(
            name,
            lambda vector: replay(vector, made(), compute),
            lambda case: logits_and_experts(case, made()),
        )

    found = [ours("numpy float32", "float32", lambda: numpy_backend(np.float32))]
    if (loops := cpu()) is not None:
        found.append(ours("cpu float32", "float32", lambda: loops))
    if find_spec("torch"):
        found += [
            ours("torch float32", "float32", lambda: torch("float32")),
            ours("torch bfloat16 weights", "float32", lambda: torch("bfloat16", "float32")),
            ours("torch bfloat16", "bfloat16", lambda: torch("bfloat16", "bfloat16")),
        ]
    if witness.available():
        found += [
            Column(f"transformers {dtype}", partial(recorded, dtype=dtype), partial(witnessed, dtype=dtype))
            for dtype in ("float32", "bfloat16")
        ]
    for name, logits in peers.engines():  # whole models only
        found.append(Column(name, lambda vector: None, partial(without_experts, logits)))
    return found


def without_experts(logits: peers.Logits, case: Case) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """Return another engine's result for a case: its logits, and no experts."""
    return logits(case), []


def cpu() -> Backend | None:
    """Return the compiled loops with float32 activations; None where they cannot be had."""
    from refengine.backends.cpu import cpu_backend

    try:
        return cpu_backend("float32")
    except InputError:
        return None


def torch(dtype: str, compute: str | None = None) -> Backend:
    """Return the PyTorch backend on the processor."""
    from refengine.backends.pytorch import torch_backend

    return torch_backend(dtype, compute=compute)


def recorded(vector: Vector, dtype: str) -> dict[str, np.ndarray] | None:
    """Return transformers' outputs of a case; None where it has no such operation."""
    alone = {key: a for key, a in vector.arrays.items() if key != "in.lengths"}
    found = witness.record(replace(vector, arrays=alone), dtype)
    return None if found is None else found[0]


def cases(operation: str) -> list[Vector]:
    """Return the cases of an operation."""
    plan = PLANS[operation]
    head = "*E" if operation == "prediction head" else ""
    return [made(operation, Case(layers=plan.layers, mtp_layers=head, seed=seed, **SIZES)) for seed in SEEDS]


def witnessed(case: Case, dtype: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return transformers' logits l v and experts l k."""
    chosen: list[np.ndarray] = []
    model = witness.hf_model(case.cfg, case.read, dtype)
    for module in model.modules():
        if type(module).__name__ == "NemotronHTopkRouter":
            module.register_forward_hook(lambda m, given, out: chosen.append(np.sort(out[2].numpy())))
    return witness.logits(model, case.ids[:1])[0], chosen


def models(layers: str) -> list[Case]:
    """Return the cases of a whole model; all of its experts are chosen in every second case."""
    every = SIZES | dict(num_experts_per_tok=8)
    return [Case(layers=layers, seed=seed, **(every if seed % 2 else SIZES)) for seed in range(8)]


def model_error(case: Case, column: Column) -> float | None:
    """Return the relative rms error of the logits before the first near-tie; None without any logits."""
    true = truth(case, 0)
    close = np.flatnonzero(true.margin <= CLOSE * eps("bfloat16"))
    sure = int(close[0]) if len(close) else len(true.margin)
    if not sure:
        return None
    logits = column.logits(case)[0]
    return None if logits is None else rms(logits[:sure] - true.logits[:sure]) / rms(true.logits[:sure])


def made(operation: str, case: Case) -> Vector:
    """Return a vector whose inputs are bfloat16 numbers, as its weights are."""

    def rounded(given: dict, weights: dict) -> None:
        for arrays in (given, weights):
            for key, a in arrays.items():
                if a.dtype.kind != "i":
                    arrays[key] = a.astype(DTYPES["BF16"]).astype(a.dtype)

    return make(f"accuracy/{case.seed}", operation, case, "accuracy", rounded)


def error(vector: Vector, column: Column) -> float | None:
    """Return the rms error of a case over that of the right values, all outputs together; None without.

    Positions that rounding to the coarsest dtype here, bfloat16, may send to other experts are left out, for
    every column alike.
    """
    answers = column.compute(vector)
    if answers is None:
        return None
    squares, size = 0.0, 0.0
    for name in ("y", "S", "logits", "u", "weights", "r", "o", "x"):
        if name not in answers or name not in vector.outputs:
            continue
        output = vector.outputs[name]
        right = vector.arrays[output.expected]
        keep = kept(vector, output, right.shape)
        if output.ties and "margin" in vector.arrays:
            close = vector.arrays["margin"] <= CLOSE * eps("bfloat16")
            close = np.logical_or.accumulate(close, axis=1) if output.ties == "onwards" else close
            keep = keep & ~spread(close, right.ndim)
        squares += float(np.sum(np.square(np.asarray(answers[name], np.float64) - right)[keep]))
        size += float(np.sum(np.square(right)[keep]))
    return float(np.sqrt(squares / size)) if size else None


def table(engines: list[Column]) -> Iterator[tuple[str, int, list[float | None]]]:
    """Yield for each operation and model: its name, how many cases counted, each engine's mean error.

    Means are geometric.
    """
    for operation in OPERATIONS:
        vectors = cases(operation)
        yield operation, *means([[error(vector, engine) for engine in engines] for vector in vectors])
    for layers in MODELS:
        rows = [[model_error(case, engine) for engine in engines] for case in models(layers)]
        yield f"model `{layers}`", *means(rows)


def means(rows: list[list[float | None]]) -> tuple[int, list[float | None]]:
    """Return how many rows have a value, and the mean of each column over them."""
    counted = [row for row in rows if any(value is not None for value in row)]
    return len(counted), [mean(list(column)) for column in zip(*counted, strict=True)]


def mean(values: list[float | None]) -> float | None:
    """Return the geometric mean of the values that are there; None without any; 0 where one is exact."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return float(np.exp(np.mean(np.log(there)))) if min(there) > 0 else float(np.mean(there))


def rms(a) -> float:
    """Return the root of the mean of squares."""
    return float(np.sqrt(np.mean(np.square(a))))


class Initialised(Case):
    """A case whose weights are those of transformers' own initialisation, rounded to bfloat16.

    The scores of a router lie close together there: rounding flips experts, in transformers as here.
    """

    def read(self, name: str) -> np.ndarray:
        """Return a tensor by its name in the checkpoint."""
        return initialised(self)[name]


@lru_cache(maxsize=2)
def initialised(case: Initialised) -> dict[str, np.ndarray]:
    """Return the tensors of a new model of transformers, by their names in a checkpoint."""
    torch, transformers, _ = witness.libraries()
    torch.manual_seed(case.seed)
    stale = {"model_type", "architectures", "num_hidden_layers", "dtype"}
    config = transformers.NemotronHConfig(**{k: v for k, v in case.cfg.to_hf().items() if k not in stale})
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors: dict[str, np.ndarray] = {}
    for key, there in model.state_dict().items():
        name, values = key.replace("model.", "backbone.", 1), there.float().numpy()
        if ".experts." in name:
            before, after = name.split(".experts.")
            tensors |= {f"{before}.experts.{e}.{after}.weight": a for e, a in enumerate(values)}
        else:
            tensors[name] = values
    return {
        name: a if name.endswith("e_score_correction_bias") else a.astype(DTYPES["BF16"])
        for name, a in tensors.items()
    }


def initialised_cases(count: int = 24) -> list[Initialised]:
    """Return models of pattern ME*EMEM*E with 16 experts, 4 chosen, and a latent of 32 or none."""
    sizes: dict[str, Any] = dict(
        layers="ME*EMEM*E", length=16, hidden_size=64, mamba_head_dim=16, head_dim=16
    )
    sizes |= dict(batch=1, ssm_state_size=16, heads_per_group=4, attention=(8, 2), n_routed_experts=16)
    return [Initialised(seed=i, moe_latent_size=None if i % 2 else 32, **sizes) for i in range(count)]


@dataclass(frozen=True)
class Choice:
    """Holds relative rms errors of a model's logits in bfloat16, and how many choices are not float64's."""

    case: Initialised
    ours: float
    theirs: float
    our_flips: int
    their_flips: int

    @property
    def ratio(self) -> float:
        """Return our error over theirs."""
        return self.ours / self.theirs


def compare(case: Initialised) -> Choice:
    """Return our error and transformers', both in bfloat16 with bfloat16 activations."""
    expected, chosen = logits_and_experts(case, numpy_backend(np.float64, ops=DEFINITION))
    mine, ours_chosen = logits_and_experts(case, torch("bfloat16", "bfloat16"))
    other, theirs_chosen = witnessed(case, "bfloat16")
    flips = [
        sum(int((a != b).any(-1).sum()) for a, b in zip(chosen, each, strict=True))
        for each in (ours_chosen, theirs_chosen)
    ]
    size = rms(expected)
    return Choice(case, rms(mine - expected) / size, rms(other - expected) / size, *flips)


def logits_and_experts(case: Case, backend: Backend) -> tuple[np.ndarray, list]:
    """Return the logits [l v], and the experts [l k] of each router in order of their numbers."""
    chosen = []

    def route(*arguments):
        routing = backend.ops.route(*arguments)
        chosen.append(np.sort(backend.fetch(routing.expert)[0]))
        return routing

    watching = replace(backend, ops=replace(backend.ops, route=route))
    m = Model.build(case.cfg, case.read, watching)
    h, _ = m.blocks(m.embed(backend.array(case.ids[:1])), m.new_states(1))
    return np.asarray(backend.fetch(m.head(h))[0], np.float64), chosen

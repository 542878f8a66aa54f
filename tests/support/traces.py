"""Traces of small random models, with a known mistake or none, also in the form of other engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import refengine.spec.mixers
from refengine.conformance.cases import Case
from refengine.conformance.mistakes import Mistake
from refengine.conformance.traces import Trace
from refengine.conformance.traces.record import record
from refengine.spec.config import Config
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend

LAYERS = {"M": "M-", "*": "*-", "E": "E-", "-": "-", "M*E-": "M-", "outer": "*-", "mtp": "M"}
OUTSIDE = (".input", ".output", "final_hidden", "logits", "embeddings", "mtp.eh_proj")
CHANGES = {  # of the config, by a part of a mistake's name
    "eps 1e-": {"layer_norm_epsilon": 1e-2},
    "has no eps": {"layer_norm_epsilon": 1e-2},
    "time_step_limit": {"time_step_limit": (0.01, 0.5)},
    "norm_topk_prob is false": {"norm_topk_prob": False},
}
SIZES = {  # of the case
    "as text": {"n_routed_experts": 12},
    "roup": {"n_group": 3, "n_routed_experts": 12},
}
VALUES = {  # of weights, by a part of a mistake's name: (the end of their name, the function)
    "without the minus": ("A_log", lambda a: a * 0 - 3),
    "score 0, not": ("e_score_correction_bias", lambda a: a - 3),
    "held": ("dt_bias", lambda a: np.linspace(-9, 1, len(a))),
}


class Planted:
    """A random model in which one mistake is visible: config, weights, and the trace with the mistake."""

    def __init__(self, mistake: Mistake, patch, seed: int = 1, backend=None):
        def of(table: dict) -> list:
            return [value for part, value in table.items() if part in mistake.name]

        kind = mistake.kind
        sizes = {key: value for found in of(SIZES) if kind == "E" for key, value in found.items()}
        case = Case(
            layers=LAYERS[kind], mtp_layers="*E" if kind == "mtp" else "", seed=seed, length=13, **sizes
        )
        changes = {key: value for found in of(CHANGES) for key, value in found.items()}
        self.mistake, self.case, self.cfg = mistake, case, replace(case.cfg, **changes)
        self.values = of(VALUES)
        model = Model.build(self.cfg, self.read, backend or numpy_backend(np.float32))
        plant = [mistake.planted(model)]
        if mistake.step == "mixer":
            patch.setitem(refengine.spec.mixers.MIXERS, kind, mistake.wrong)
            plant = []
        with np.errstate(all="ignore"):
            cut = None if "chunk" in mistake.name else 6
            self.trace = record(model, rows(case), cut, steps=2, plant=plant)
        patch.undo()

    def read(self, name: str) -> np.ndarray:
        """Return a weight in the file's dtype."""
        value = self.case.read(name)
        for end, change in self.values:
            if name.endswith(end):
                value = change(value).astype(value.dtype)
        return value


def rows(case: Case) -> list[list[int]]:
    """Return the prompts of a case: the first whole, the second about half."""
    return [[int(i) for i in ids[: case.length - 6 * row]] for row, ids in enumerate(case.ids[:2])]


def clean(case: Case, backend, cfg: Config | None = None, **how) -> Trace:
    """Return the trace of a case on a backend, read in pieces and decoded."""
    model = Model.build(cfg or case.cfg, case.read, backend)
    return record(model, rows(case), **({"cut": 6, "steps": 2} | how))


def outside(trace: Trace) -> Trace:
    """Return a trace with inputs and outputs of the layers only, as other engines can record it."""
    return replace(trace, arrays={k: v for k, v in trace.arrays.items() if k.endswith(OUTSIDE)})

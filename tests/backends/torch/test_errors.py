"""Our errors are at most those of transformers, both against the definition in float64, at the same dtype.

`python -m tests.backends.torch.test_errors` prints the table of all cases. In two thirds of them every token
visits every expert. In the others experts are chosen, and cases with a close choice are counted separately,
because a flipped expert is not rounding. docs/accuracy.md has models as transformers initialises them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from refengine.conformance import accuracy, witness
from refengine.conformance.accuracy import SIZES, rms
from refengine.conformance.cases import Case
from refengine.conformance.truth import truth
from refengine.spec.model import Model
from tests.support.torch_benches import Torch, needs_cuda
from tests.support.tries import thorough

LAYERS = ("M", "*", "E", "-", "M*", "ME", "M*E-", "MEM*E", "MM-*-", "MEMEM*EME", "M-M-M*-M-", "EEM*M")
BAR, SINGLE = 1.1, 1.5  # of our error over theirs: the geometric mean, and each case without a near-tie
# a margin of the router that rounding may overcome
CLOSE = {"float32": 1e-5, "float16": 0.004, "bfloat16": 0.03}
CPU = [
    Torch("torch-float32", "float32"),
    Torch("torch-bfloat16", "bfloat16", "float32"),
    Torch("torch-bfloat16-units", "bfloat16", "bfloat16"),
    Torch("torch-float16", "float16"),
]
BENCHES = [
    *CPU[:2],
    *thorough(*CPU[2:]),
    pytest.param(Torch("cuda-bfloat16", "bfloat16", device="cuda"), marks=[pytest.mark.gpu, needs_cuda]),
]


def cases() -> list[Case]:
    return [
        Case(layers=layers, seed=seed, **(SIZES | dict(num_experts_per_tok=k, moe_latent_size=latent)))
        for seed, (k, latent) in enumerate(((8, None), (8, 24), (2, 24)))
        for layers in LAYERS
    ]


def ours(case: Case, how: Torch, one_by_one: bool = False) -> np.ndarray:
    m = Model.build(case.cfg, case.read, how())
    states, pieces = m.new_states(1), []
    for ids in np.split(case.ids, case.length, axis=1) if one_by_one else [case.ids]:
        h, states = m.blocks(m.embed(m.backend.array(ids)), states)
        pieces.append(m.backend.fetch(m.head(h))[0])
    return np.concatenate(pieces)


@lru_cache(None)  # two benches have the same dtype
def theirs(case: Case, dtype: str) -> np.ndarray:
    """Return the logits of transformers, with its limit of dt corrected."""
    return witness.logits(witness.hf_model(case.cfg, case.read, dtype), case.ids)[0]


def compare(case: Case, how: Torch) -> tuple[float, float, float, bool]:
    """Return our rms error, that of reading token by token, theirs, and whether a choice was nearly a tie."""
    true = truth(case, 0)
    errors = [
        rms(logits - true.logits)
        for logits in (ours(case, how), ours(case, how, True), theirs(case, how.dtype))
    ]
    return *errors, bool(true.margin.min() < CLOSE[how.dtype])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("layers", ["M*E-", "MEMEM*EME"])
def test_a_token_at_a_time_is_as_exact_as_all_at_once(layers, compiled):
    """With bfloat16 weights and float32 activations, with the compiled loops and without them."""
    case = next(case for case in cases() if case.layers == "M*E-")
    case = replace(case, layers=layers)
    how, true = Torch("bfloat16", "bfloat16", "float32", compiled=compiled), truth(case, 0).logits
    at_once, one_by_one = (rms(ours(case, how, each) - true) / rms(true) for each in (False, True))
    assert at_once < 3e-6 and one_by_one < 3e-6


@pytest.mark.slow
@pytest.mark.skipif(not witness.available(), reason="needs transformers")
@pytest.mark.parametrize("how", BENCHES, ids=lambda how: how.name)
def test_errors_are_no_larger_than_those_of_transformers(how, record_property, pytestconfig):
    """The default tier leaves out the models in which experts are chosen."""
    rows = [compare(case, how) for case in cases()[: None if pytestconfig.getoption("--thorough") else 24]]
    sure = np.array([row[:3] for row in rows if not row[3]])
    at_once, one_by_one = (np.exp(np.mean(np.log(sure[:, i] / sure[:, 2]))) for i in (0, 1))
    record_property(f"worst rms error over transformers', {how.name}", float(at_once))
    record_property(f"worst rms error over transformers', {how.name}, token by token", float(one_by_one))
    assert len(sure) >= 20
    assert at_once <= BAR and one_by_one <= BAR
    assert (sure[:, :2] / sure[:, 2:]).max() <= SINGLE


@pytest.mark.slow
@pytest.mark.skipif(not witness.available(), reason="needs transformers")
def test_errors_on_models_as_transformers_initialises_them(record_property):
    """The single bar applies where both choose the experts of float64."""
    rows = [accuracy.compare(case) for case in accuracy.initialised_cases()]
    ratio = np.array([row.ratio for row in rows])
    mean = float(np.exp(np.log(ratio).mean()))
    record_property("worst rms error over transformers', bfloat16 activations, as initialised", mean)
    assert mean <= BAR
    same = ratio[[not row.our_flips + row.their_flips for row in rows]]
    assert len(same) >= 4 and same.max() <= SINGLE


def main() -> None:
    for how in CPU:
        head = ("experts", "ours", "a token at a time", "transformers", "ratio", "")
        print("", f"| {how.name} | {' | '.join(head)} |", "|---|---|---|---|---|---|---|", sep="\n")
        for case in cases():
            whole, single, other, close = compare(case, how)
            chosen = f"{case.num_experts_per_tok} of {case.n_routed_experts}" if "E" in case.layers else ""
            errors = " | ".join(f"{error:.2e}" for error in (whole, single, other))
            note = "near a tie" if close else ""
            print(f"| `{case.layers}` | {chosen} | {errors} | {whole / other:.2g} | {note} |")


if __name__ == "__main__":
    main()

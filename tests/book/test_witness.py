"""Our logits agree with transformers, on random checkpoints of every layer kind at odd sizes."""

import json
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest

from refengine.conformance.cases import Case, terms
from refengine.conformance.truth import model, truth
from refengine.spec.config import Config
from refengine.spec.model import Model
from refengine.spec.ops import DEFINITION, numpy_backend

why = "the live witness needs: pip install 'refengine[test]'"
pytest.importorskip("torch", reason=why)
pytest.importorskip("transformers", minversion="5.8.1", reason=why)
from refengine.conformance.witness import hf_model as theirs  # noqa: E402
from refengine.conformance.witness import logits  # noqa: E402

pytestmark = pytest.mark.slow

PLAIN = {"moe_latent_size": None}
MODELS = {  # prompts that no chunk divides
    "latent": Case(layers="MEM*EME", length=37, n_groups=2),
    "latent, limited to groups": Case(layers="ME*EMM", length=29, n_groups=8, heads_per_group=1, n_group=3),
    "plain": Case(layers="MEMEM*E", length=23, n_groups=8, chunk_size=16, conv_kernel=2, **PLAIN),
    "plain, limited to groups": Case(layers="EM*E", length=31, n_group=3, n_routed_experts=12, **PLAIN),
    "one expert, not normalised": Case(layers="*EME", length=19, num_experts_per_tok=1, norm_topk_prob=False),
    "dense, with runs": Case(layers="MM--*-M*MMM-", length=41, n_groups=1, mamba_head_dim=9),
    "all kinds": Case(layers="M*E-ME-*", length=26, attention=(5, 1), head_dim=12, chunk_size=1),
    "tied": Case(layers="M*-E", length=13, tied=True, attention=(6, 3), chunk_size=64, conv_kernel=3),
}
SEEDS = range(4)
BAR = 1e-4  # the stated bar, relative to max(1, largest logit); far above measured errors
OURS = {"float32": numpy_backend(np.float32), "definition": numpy_backend(np.float32, ops=DEFINITION)}
each = pytest.mark.parametrize(("name", "seed"), [(name, seed) for name in MODELS for seed in SEEDS])


def run(case: Case, backend, pieces: list[slice]) -> np.ndarray:
    m, out = model(case, backend), []
    states = m.new_states(case.batch)
    for piece in pieces:
        h, states = m.blocks(m.embed(case.ids[:, piece]), states)
        out.append(m.head(h))
    return np.concatenate(out, axis=1)


def compare(case: Case, ours, expected, what: str, record_property):
    """Compare up to the first token with a near tie of experts; count the sequences that end early."""
    for row in range(case.batch):
        sure = truth(case, row).sure(np.float32, terms(case.cfg, case.length))
        error = np.abs(ours[row, :sure] - expected[row, :sure]).max(initial=0)
        error /= max(1.0, np.abs(expected).max())
        record_property(f"worst error of float32 logits against {what}", float(error))
        record_property("sequences compared only up to a router tie", int(sure < case.length))
        assert error <= BAR, f"{case!r}, row {row}, against {what}: off by {error:.3g}, not {BAR}"


def float64(case: Case) -> np.ndarray:
    return np.stack([truth(case, row).logits for row in range(case.batch)])


@lru_cache
def answer(case: Case) -> np.ndarray:
    return logits(theirs(case.cfg, case.read), case.ids)


@each
def test_logits_are_those_of_transformers(name, seed, record_property):
    case = replace(MODELS[name], seed=seed)
    expected = answer(case)
    for backend in OURS.values():
        ours = run(case, backend, [slice(0, case.length)])
        compare(case, ours, expected, "transformers", record_property)
        compare(case, ours, float64(case), "our float64", record_property)
    compare(case, float64(case), expected, "our float64 (theirs)", record_property)


@each
def test_prefill_decode_and_a_second_prefill_are_those_of_transformers(name, seed, record_property):
    """Both continue from their states, and transformers agrees with its own single call."""
    case = replace(MODELS[name], seed=seed + 100)
    ends = [0, case.length // 3, *range(case.length // 3 + 1, case.length // 2 + 1), case.length]
    pieces = [slice(a, b) for a, b in pairwise(ends)]
    assert len(pieces) >= 4
    ours, witness = run(case, OURS["float32"], pieces), theirs(case.cfg, case.read)
    compare(case, ours, logits(witness, case.ids, pieces), "transformers with its cache", record_property)
    compare(case, ours, logits(witness, case.ids), "transformers", record_property)
    compare(case, ours, float64(case), "our float64", record_property)


def test_our_errors_are_no_larger_than_theirs(record_property):
    """The bar for a backend: the geometric mean of the ratios of rms errors is at most 1.1."""
    ratios, tied = [], 0
    for case in (replace(case, seed=seed) for case in MODELS.values() for seed in SEEDS):
        exact, whole = float64(case), [slice(0, case.length)]
        size = terms(case.cfg, case.length)
        if any(truth(case, row).sure(np.float32, size) < case.length for row in range(case.batch)):
            tied += 1
            continue
        ours, others = (rms(a - exact) for a in (run(case, OURS["float32"], whole), answer(case)))
        ratios.append(ours / others)
    mean = float(np.exp(np.mean(np.log(ratios))))
    record_property(f"worst geometric mean, of {len(ratios)} cases, of our rms error over theirs", mean)
    assert len(ratios) >= 20, f"{tied} cases have a router tie"
    assert mean <= 1.1


def rms(a) -> float:
    return float(np.sqrt(np.mean(a**2)))


def test_their_clamp_of_dt_changes_their_result_and_not_ours(record_property):
    """As shipped, transformers holds dt at 0.001 or more in prefill only (trap 1); steps here are 0.0001."""
    case = Case(layers="MM*-", length=37, seed=3)

    def read(name):
        value = case.read(name)
        return (value * 0 - 9).astype(value.dtype) if name.endswith("dt_bias") else value

    m = Model.build(case.cfg, read, OURS["float32"])
    ours = m.head(m.blocks(m.embed(case.ids), m.new_states(case.batch))[0])
    free, witness = logits(theirs(case.cfg, read), case.ids), theirs(case.cfg, read, clamp=True)
    shipped = logits(witness, case.ids)
    one_by_one = logits(witness, case.ids, [slice(i, i + 1) for i in range(case.length)])
    scale = max(1.0, np.abs(free).max())
    record_property("worst change by their clamp of dt", float(np.abs(shipped - free).max() / scale))
    assert np.abs(ours - free).max() <= BAR * scale
    assert np.abs(ours - shipped).max() > 100 * BAR * scale
    assert np.abs(one_by_one - shipped).max() > 100 * BAR * scale  # their prefill differs from their decode


@pytest.mark.parametrize("name", MODELS)
def test_a_config_that_transformers_saved_is_read_back(name):
    """Its names of layer kinds and its spelling of infinity are read."""
    cfg = MODELS[name].cfg
    assert Config.from_hf(json.loads(theirs(cfg, MODELS[name].read).config.to_json_string())) == cfg

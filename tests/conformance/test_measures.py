"""The figures of the kit are what its pages define: fingerprints, tolerances, margins, ratios and limits."""

import math
from dataclasses import replace

import numpy as np
import pytest

import refengine
from refengine.checkpoint.fingerprint import fingerprint
from refengine.conformance import prefill_decode
from refengine.conformance.cases import Case
from refengine.conformance.mistakes import named
from refengine.conformance.traces.diff import CAUSES, diagnose
from refengine.conformance.traces.recompute import margin
from refengine.conformance.vectors import judge_output
from refengine.conformance.vectors.files import SHIPPED, manifest, shipped_vector
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.quant import nvfp4
from tests.support.traces import clean


@pytest.mark.parametrize("packs", [lambda w: w, nvfp4], ids=["plain", "packed"])
def test_a_fingerprint_reads_the_start_the_middle_and_the_end_of_each_tensor(packs):
    case = Case(layers="-", hidden_size=512)
    name = "backbone.layers.0.mixer.up_proj.weight"
    right = case.read(name)

    def of(at):
        """Return the fingerprint with the row `at` of a matrix of 31 KB changed."""
        changed = right.copy()
        changed[at] = -changed[at]
        return fingerprint(case.cfg, lambda key: packs(changed) if key == name else case.read(key))

    found = [of(slice(0, 0)), *(of(row) for row in (0, len(right) // 2, len(right) - 1))]
    assert right.nbytes > 3 * 4096 and len(set(found)) == 4


def test_prefill_decode_measures_what_it_names():
    """The KL divergence is of the prefill's distribution from the decode's; the ratio a mean of ratios."""

    def step(model, ids, states):
        h, states = model.blocks(model.embed(np.asarray(ids)[:, None]), states)
        return 1.5 * model.head(h)[:, 0], states

    count = 6
    with refengine.load("tiny", replace(numpy_backend(), step=step)) as engine:
        found = prefill_decode.compare(engine, count, seed=3)
        prompt = prefill_decode.first_ids(engine)
        ids, decoded = prefill_decode.sampled(engine.runner, prompt, count, 3)
        read = engine.runner.logits(ids)[len(prompt) - 1 : -1]
    ratios, divergences = [], []
    for x, y, token in zip(decoded, read, ids[len(prompt) :], strict=True):
        p, q = (np.exp(each.astype(np.float64)) / np.exp(each.astype(np.float64)).sum() for each in (x, y))
        ratios.append(max(p[token] / q[token], q[token] / p[token]))
        divergences.append(float((p * np.log(p / q)).sum()))
    assert max(ratios) > 1.2  # so that a mean of ratios is not one of their logarithms
    assert math.isclose(found.ratio, np.mean(ratios), rel_tol=1e-5)
    assert math.isclose(found.worst_ratio, max(ratios), rel_tol=1e-5)
    assert math.isclose(found.kl, np.mean(divergences), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tolerance_of_the_manifest_is_what_check_allows(dtype):
    for entry in manifest(SHIPPED):
        if entry["name"] not in ("ssd_scan/small-steps", "rms_norm/large-eps", "mlp/two-matrices"):
            continue
        vector = shipped_vector(entry["name"])
        for name, due in entry["outputs"].items():
            right = vector.arrays[due["expected"]].astype(np.float64)
            off = due["tolerance"][dtype] * max(1.0, np.abs(right).max())
            near, far = (judge_output(vector, name, right + share * off, dtype) for share in (0.9, 1.1))
            assert near.passed and not far.passed, (vector.name, name)


def test_at_most_three_mistakes_are_named():
    case = Case(layers="M-", seed=2, length=7)
    mistake = named("the norm is over all of the inner width")
    backend = numpy_backend(np.float32)
    model = Model.build(case.cfg, case.read, backend)
    trace = clean(case, backend, plant=[mistake.planted(model)])
    twins = [replace(mistake, name=f"{mistake.name}, again {i}") for i in range(5)]
    (found,) = [f for f in diagnose(trace, case.cfg, case.read, twins) if f.wrong]
    assert len(found.causes) == CAUSES == 3 and set(found.causes) <= set(twins)


def test_the_margin_of_a_router_is_that_of_experts_and_of_groups():
    """A change of every score by less than a quarter of it changes no choice."""
    cfg = Case(layers="E", n_routed_experts=12, n_group=3).cfg
    scores = np.array([0.9, 0.8, 0.1, 0.1, 0.7, 0.2, 0, 0, 0.6, 0.3 - 1e-6, 0, 0])
    assert math.isclose(margin(scores, cfg), 1e-6, rel_tol=1e-6)  # two of three groups: 1.7, 0.9, 0.9 - 1e-6
    plain = Case(layers="E", n_routed_experts=12).cfg
    assert math.isclose(margin(scores, plain), 0.6 - (0.3 - 1e-6), rel_tol=1e-6)  # four of twelve

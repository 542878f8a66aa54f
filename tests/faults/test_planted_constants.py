"""Each constant, fixed at its usual value in one place, fails a law."""

from dataclasses import replace

import numpy as np
import pytest

from refengine.conformance.cases import Case
from refengine.spec import mtp
from refengine.spec.model import Model
from refengine.spec.ops import Backend
from tests.book.test_constants import check
from tests.support.benches import BENCHES

CASE = Case(layers="ME*-", mtp_layers="*E", batch=1, length=7, n_group=3, layer_norm_epsilon=0.2)
LIMIT = (0.05, 0.4)
CFG = replace(CASE.cfg, time_step_limit=LIMIT, routed_scaling_factor=0.7, norm_topk_prob=False, topk_group=2)
WHOLE = [slice(0, CASE.length)]


def bench() -> Backend:
    return BENCHES["numpy-float32"]()


def with_fixed_eps(backend: Backend, verb: str, at: int, position: int) -> Backend:
    """Return a backend in which call number `at` of a verb, in a model and its head, has an eps of 1e-5."""
    right, calls = getattr(backend.ops, verb), []

    def wrong(*args):
        calls.append(verb)
        if (len(calls) - 1) % norms(verb) == at:
            args = (*args[:position], 1e-5, *args[position + 1 :])
        return right(*args)

    return replace(backend, ops=replace(backend.ops, **{verb: wrong}))


def norms(verb: str) -> int:
    """Return how often a model of the case and its head call a verb."""
    if verb == "gated_rms_norm":
        return CASE.layers.count("M")
    return len(CASE.layers) + 1 + 2 + len(CASE.mtp_layers) + 1  # final norm; enorm, hnorm; the head's last


PLACES = [("gated_rms_norm", 0)] + [("rms_norm", i) for i in range(norms("rms_norm"))]


def test_the_case_is_sound_and_the_norms_are_counted():
    counted, here = [], bench()

    def rms_norm(*args):
        counted.append(1)
        return here.ops.rms_norm(*args)

    watched = replace(here, ops=replace(here.ops, rms_norm=rms_norm))
    check(watched, CASE, CFG, WHOLE)
    assert len(counted) == norms("rms_norm")


@pytest.mark.parametrize("verb, at", PLACES)
def test_an_eps_that_is_fixed_in_one_norm_goes_red(verb, at):
    with pytest.raises(AssertionError):
        check(with_fixed_eps(bench(), verb, at, 3), CASE, CFG, WHOLE)


ASSUMED = {
    "time_step_limit": (0.0, np.inf),
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "topk_group": 1,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", ASSUMED)
def test_a_constant_that_is_assumed_goes_red(name, monkeypatch):
    """The model is built with another configuration than that of its checkpoint."""
    right = Model.build

    def build(cfg, read, backend):
        return replace(right(cfg, read, backend), cfg=replace(cfg, **{name: ASSUMED[name]}))

    check(bench(), CASE, CFG, WHOLE)
    monkeypatch.setattr(Model, "build", build)
    with pytest.raises(AssertionError):
        check(bench(), CASE, CFG, WHOLE)


def test_a_head_that_reads_itself_goes_red(monkeypatch):
    """The head's second layer is left out."""
    right = mtp.head_layers
    monkeypatch.setattr(mtp, "head_layers", lambda model: right(model)[:1] * 2)
    with pytest.raises((AssertionError, KeyError)):
        check(bench(), CASE, CFG, WHOLE)

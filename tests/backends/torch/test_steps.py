"""A decoding step in compiled loops gives the logits and states of the verbs, for every kind of layer."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, cases, terms
from refengine.ranks.comm import RankError, Solo
from refengine.ranks.comm.threads import on_each
from refengine.spec import state as spec_state
from refengine.spec.layout import plan
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.ranks import new_states, part
from refengine.spec.shard import Shard
from tests.support.torch_benches import torch

from refengine.backends.cpu import native, steps  # isort: skip
from refengine.backends.pytorch import torch_backend  # isort: skip

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")


def built(case: Case, dtype: str = "bfloat16", compute: str = "float32") -> Model:
    return Model.build(case.cfg, case.read, torch_backend(dtype, compute=compute))


def exact(case: Case) -> Model:
    return Model.build(case.cfg, case.read, numpy_backend(np.float64))


def read(m: Model, ids: np.ndarray, n=None) -> list:
    """Return the states after some positions, n [b] of which are real."""
    here = m.backend
    n = None if n is None else here.array(n)
    return m.blocks(m.embed(here.array(ids)), m.new_states(len(ids)), n)[1]


def plain(m: Model, ids: np.ndarray, states: list):
    h, states = m.blocks(m.embed(m.backend.array(ids[:, None])), states)
    return m.backend.fetch(m.head(h))[:, 0], states


def near(case: Case, actual, expected, eps: float = 2.0**-23):
    assert actual.shape == expected.shape and actual.dtype == np.float32
    allowed = 4 * eps * terms(case.cfg, 40) ** 0.5 * max(1, abs(expected).max())
    assert np.abs(actual - expected).max() <= allowed


STEPS = cases(n_group=1, max_length=12)


@given(case=STEPS, tied=st.booleans(), count=st.integers(1, 4))
def test_reading_and_then_stepping_is_what_the_definition_says(case, tied, count):
    """Rows have different lengths before the step; plain calls can continue from its states."""
    m, true, ids = built(case), exact(case), case.ids
    assert m.backend.step.program(m), "the loops serve it"
    mine, theirs = read(m, ids, case.lengths), read(true, ids, case.lengths)
    for t in range(count):
        logits, mine = (plain if t == 2 else m.backend.step)(m, ids[:, t % case.length], mine)
        expected, theirs = plain(true, ids[:, t % case.length], theirs)
        near(case, logits, expected)


BOTH = Case(layers="M*E-", batch=3, length=70)


def test_a_fork_and_its_origin_go_their_own_ways():
    m, true, ids = built(BOTH), exact(BOTH), BOTH.ids
    past = read(m, ids[:, :9])
    futures = [(past, 0), (spec_state.fork(past), 1), (spec_state.fork(past), 2)]
    for t in range(3):
        after = []
        for states, which in futures:
            logits, states = m.backend.step(m, ids[:, 20 * which + t], states)
            after.append((states, which))
            known = np.concatenate([ids[:, :9], ids[:, 20 * which : 20 * which + t + 1]], axis=1)
            h, _ = true.blocks(true.embed(known), true.new_states(3))
            near(BOTH, logits, true.head(h)[:, -1])
        futures = after


def test_sequences_leave_and_caches_grow():
    """A cache starts with room for 64 positions."""
    m, true, ids = built(BOTH), exact(BOTH), BOTH.ids
    mine, theirs = m.new_states(3), true.new_states(3)
    for t in range(70):
        if t == 30:
            mine, theirs, ids = spec_state.take(mine, [2, 0]), spec_state.take(theirs, [2, 0]), ids[[2, 0]]
        logits, mine = m.backend.step(m, ids[:, t], mine)
        expected, theirs = plain(true, ids[:, t], theirs)
        near(BOTH, logits, expected)


def test_models_by_turns_are_told_apart():
    pairs = [(built(case), exact(case), case) for case in (BOTH, Case(layers="ME", batch=3, seed=4))]
    states = [(m.new_states(3), true.new_states(3)) for m, true, _ in pairs]
    backend = pairs[0][0].backend  # one backend, and so one Steps, for both
    for t in range(3):
        for i, (m, true, case) in enumerate(pairs):
            logits, mine = backend.step(m, case.ids[:, t], states[i][0])
            expected, theirs = plain(true, case.ids[:, t], states[i][1])
            near(case, logits, expected)
            states[i] = mine, theirs


@pytest.mark.parametrize(
    "case, dtype, known",
    [
        (Case(layers="ME", n_group=3), "bfloat16", True),
        (BOTH, "float32", True),
        (BOTH, "float16", True),
        (Case(layers="M*E", batch=33, length=3), "bfloat16", False),
    ],
    ids=["groups of experts", "float32 weights", "float16 weights", "many rows"],
)
def test_what_the_loops_do_not_know_takes_the_verbs(case, dtype, known, monkeypatch):
    m, true, calls = built(case, dtype), exact(case), []
    monkeypatch.setattr(steps, "plain", lambda *a, verbs=steps.plain: calls.append(1) or verbs(*a))
    logits, _ = m.backend.step(m, case.ids[:, 0], m.new_states(case.batch))
    eps = 2.0**-10 if dtype == "float16" else 2.0**-23  # a file in bfloat16 is rounded to float16
    near(case, logits, plain(true, case.ids[:, 0], true.new_states(case.batch))[0], eps)
    assert bool(calls) != known


def test_the_step_gives_the_same_bits_whatever_the_threads_do():
    case = Case(layers="ME*-", batch=2, hidden_size=260, head_dim=60, moe_latent_size=100)
    m, before, first = built(case), torch.get_num_threads(), None
    try:
        torch.set_num_threads(2)
        for _ in range(3):
            states, told = m.new_states(2), []
            for t in range(5):
                logits, states = m.backend.step(m, case.ids[:, t], states)
                told.append(logits)
            first = first or told
            assert np.array_equal(told, first)
    finally:
        torch.set_num_threads(before)


@given(case=cases(n_group=1, n_routed_experts=9, num_experts_per_tok=9, max_length=12))
def test_beside_bfloat16_activations_a_step_is_as_exact_as_their_states(case):
    """Every token visits every expert, so that none can flip."""
    m, true, ids = built(case, compute="bfloat16"), exact(case), case.ids
    mine, theirs = read(m, ids, case.lengths), read(true, ids, case.lengths)
    for t in range(3):
        logits, mine = (plain if t == 1 else m.backend.step)(m, ids[:, t % case.length], mine)
        expected, theirs = plain(true, ids[:, t % case.length], theirs)
        near(case, logits, expected, 2.0**-7)
    assert {s.tail.dtype for s in mine if hasattr(s, "tail")} <= {torch.bfloat16}
    assert {s.k.dtype for s in mine if hasattr(s, "k")} <= {torch.bfloat16}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("latent", [20, None])
def test_ranks_of_tp_take_the_step_together(tp, latent):
    sizes = {"n_groups": 4, "heads_per_group": 2, "attention": (8, 4), "moe_latent_size": latent}
    case = Case(layers="M*E-ME", batch=2, **sizes)
    true, ids = exact(case), case.ids

    def rank(comm):
        shard = Shard(plan(case.cfg, tp, 1, 1), comm.rank)
        m = part(case.cfg, case.read, torch_backend("bfloat16", compute="float32"), shard, comm)
        assert m.backend.step.program(m), "the loops serve it"
        states, told = new_states(m, shard, 2), []
        for t in range(3):
            logits, states = m.backend.step(m, ids[:, t], states)
            told.append(logits)
        return told

    told, states = on_each(tp, rank), true.new_states(2)
    for t in range(3):
        expected, states = plain(true, ids[:, t], states)
        for mine in told:
            near(case, mine[t], expected)


def test_what_stops_a_sum_of_ranks_stops_the_step():
    case = Case(layers="MME", n_groups=2)

    class Lost(Solo):
        def all_reduce(self, x, peers):
            raise RankError("rank 1 is gone")

    shard = Shard(plan(case.cfg, 2, 1, 1), 0)
    m = part(case.cfg, case.read, torch_backend("bfloat16", compute="float32"), shard, Lost())
    lost = replace(m.backend, ops=replace(m.backend.ops, embed=lambda ids, table: torch.zeros(len(ids), 26)))
    with pytest.raises(RankError, match="rank 1 is gone"):
        m.backend.step(replace(m, backend=lost), case.ids[:, 0], new_states(m, shard, 2))


def test_a_backend_without_the_loops_does_not_promise_a_step():
    assert torch_backend("bfloat16").step
    assert torch_backend("bfloat16", compiled=False).step is None

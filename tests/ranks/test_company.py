"""Texts over ranks agree in every number, and sums have the same bits on every rank, in the quick tier.

Sequences join and leave so that the ranks of ep have other sequences from one call to the next, as many in
all: the rank that draws for a sequence changes while it runs, and so does the split of the rows.
"""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refengine.conformance.cases import Case
from refengine.conformance.truth import model
from refengine.ranks.comm.threads import on_each
from refengine.ranks.runner import RankRunner
from refengine.runner import LocalRunner
from refengine.spec.layout import Layout
from tests.engine import test_loop
from tests.engine.test_loop import EXACT, Plan, played
from tests.support.runners import case_over_ranks

pytestmark = pytest.mark.slow

CASE = Case(layers="M*E", batch=1, length=1, n_groups=2, attention=(6, 2), n_routed_experts=9)
# Seeds choose how many likely tokens are asked for: none, one or two.
PLANS = {
    "read alone, stepping together": [
        Plan(9, 6, 1.0, 3), Plan(2, 6, 1.0, 5, joins=1), Plan(30, 5, 1.0, 4, joins=1),
    ],
    "one leaves, another joins": [
        Plan(4, 3, 1.0, 6), Plan(4, 8, 1.0, 7), Plan(4, 8, 1.0, 8), Plan(3, 5, 1.0, 10, joins=3),
        Plan(3, 4, 1.0, 11, joins=4), Plan(2, 5, 0.0, 12, joins=5),
    ],
    "cancelled beside others": [
        Plan(3, 9, 1.0, 20, leaves=2), Plan(7, 6, 1.0, 21), Plan(5, 6, 1.0, 22, leaves=3),
        Plan(5, 6, 1.0, 23, joins=2),
    ],
}  # fmt: skip
LAYOUTS = (Layout(1, 2), Layout(2), Layout(1, 1, 2), Layout(1, 3))


@pytest.fixture
def tidy(monkeypatch):
    """Check after each call that a rank holds the states of its own sequences, and no others."""
    right = RankRunner.call

    def call(self, *args):
        result = right(self, *args)
        assert self.slots.held == sorted(
            slot for slot, e in self.homes.items() if e in (None, self.shard.at[1])
        )
        return result

    monkeypatch.setattr(RankRunner, "call", call)


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    "layout, slots, chunk", [*((layout, 3, 5) for layout in LAYOUTS), (Layout(1, 2), 6, 512)], ids=str
)
def test_every_number_of_every_text_is_that_of_one_process(name, layout, slots, chunk):
    plans = PLANS[name]
    together = case_over_ranks(layout, CASE, lambda runner: played(runner, CASE, plans, slots, chunk), EXACT)
    for plan, events in zip(plans, together, strict=True):
        alone = Plan(**{**vars(plan), "joins": 0, "leaves": 99})
        [expected] = played(LocalRunner(model(CASE, EXACT)), CASE, [alone], 1, 512)
        test_loop.check(CASE, plan, events, expected, np.float64)
        for one, other in zip(events, expected, strict=False):
            if getattr(one, "logprob", None) is not None and one.id == other.id:
                assert abs(one.logprob - other.logprob) < 1e-9
                assert np.allclose([p for _, p in one.top], [p for _, p in other.top], rtol=0, atol=1e-9)
                assert len(one.top) == len(other.top) == plan.options.logprobs


def test_every_token_of_the_vocabulary_is_looked_up_once_and_has_its_logit():
    """Also the tokens at the borders between the parts of ranks."""
    ids = list(range(CASE.cfg.vocab_size))
    expected = LocalRunner(model(CASE, EXACT)).logits(ids)
    for layout in (Layout(2), Layout(2, 2)):
        logits = case_over_ranks(layout, CASE, lambda runner: runner.logits(ids), EXACT)
        assert np.allclose(logits, expected, rtol=0, atol=1e-9)


@settings(max_examples=20)
@given(count=st.integers(2, 4), seed=st.integers(0, 999), size=st.sampled_from((1, 7, 300, 20001)))
@example(count=3, seed=1, size=20001)  # more than one message
@example(count=3, seed=1, size=7)
def test_a_sum_has_the_same_bits_on_every_rank(count, seed, size):
    """All ranks that process a token must choose the same experts for it."""
    terms = np.random.default_rng([seed, size]).standard_normal((count, size)).astype(np.float32)
    sums = on_each(count, lambda comm: comm.all_reduce(terms[comm.rank], tuple(range(count))))
    for mine in sums:
        assert mine.tobytes() == sums[0].tobytes()
    assert np.allclose(sums[0], terms.astype(np.float64).sum(0), rtol=0, atol=1e-5)


@settings(max_examples=5)
@given(count=st.integers(3, 5), seed=st.integers(0, 99), size=st.sampled_from((7, 40001)))
def test_a_sum_of_bfloat16_is_rounded_once(count, seed, size):
    torch = pytest.importorskip("torch", reason="bfloat16 tensors need: pip install 'refengine[torch]'")
    terms = np.random.default_rng([seed, size]).standard_normal((count, size)).astype(np.float32)
    given_terms = [torch.tensor(term).bfloat16() for term in terms]
    exact = sum(term.double() for term in given_terms)
    sums = on_each(count, lambda comm: comm.all_reduce(given_terms[comm.rank], tuple(range(count))))
    nearest = exact.float().bfloat16()
    spacing = torch.maximum(exact.abs(), torch.tensor(2.0**-10, dtype=torch.float64)) * 2.0**-8
    for mine in sums:
        assert torch.equal(mine, sums[0]) and mine.dtype == torch.bfloat16
        assert ((mine.double() - exact).abs() <= spacing * 1.001).all()
    assert (sums[0] == nearest).double().mean() > 0.999

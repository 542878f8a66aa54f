"""Greedy text is the same with and without drafts, and so are the states after it."""

from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, cases
from refengine.conformance.truth import model
from refengine.generation import Options
from refengine.runner import How, LocalRunner, Part
from refengine.spec import mtp
from refengine.spec.ops import numpy_backend
from refengine.spec.sample import Sampling
from refengine.speculation import drafting
from tests.engine.test_loop import Plan, check, played
from tests.support.drafts import oracle
from tests.support.sequences import Sequences

GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Drafted(Plan):
    """A sequence with drafts: this many tokens a call, or auto."""

    speculate: int | str | None = None

    @property
    def options(self) -> Options:
        return replace(super().options, speculate=self.speculate)


PLANS = st.lists(
    st.builds(
        Drafted,
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 12),
        temperature=st.just(0.0),
        seed=st.integers(0, 99),
        penalty=st.sampled_from((1.0, 1.3)),
        joins=st.integers(0, 4),
        leaves=st.sampled_from((99, 99, 3)),
        speculate=st.sampled_from((1, 2, 3, 5, "auto", None)),
    ),
    min_size=1,
    max_size=4,
)


def headed(**fixed):
    """Return a strategy of models with a prediction head."""
    return cases(batch=1, length=1, mtp_layers="*E", **fixed)


def alone(case: Case, backend, plans: list[Drafted]) -> list[list]:
    """Return the events of each plan by itself, without drafts."""
    runs = []
    for plan in plans:
        plain = replace(plan, joins=0, leaves=99, speculate=None)
        [found] = played(LocalRunner(model(case, backend)), case, [plain], 1, 512)
        runs.append(found)
    return runs


def oracle_of(case: Case, plans: list[Drafted], runs: list[list], rate: float, seed: int = 0):
    """Return a patch with which a given share of the drafts is right."""
    texts = {
        tuple(plan.prompt(case)): [event.id for event in run if hasattr(event, "id")]
        for plan, run in zip(plans, runs, strict=True)
    }
    return oracle(texts, rate, seed)


@given(
    case=headed(),
    plans=PLANS,
    slots=st.integers(1, 3),
    chunk=st.sampled_from((512, 5)),
    rate=st.sampled_from((0.0, 0.6, 1.0)),
)
@example(
    case=Case(mtp_layers="*E"),
    plans=[Drafted(9, 12, 0.0, i, joins=i, speculate=k) for i, k in enumerate((1, 3, "auto"))],
    slots=2,
    chunk=5,
    rate=0.6,
)
def test_greedy_text_with_drafts_is_greedy_text_without(backend, case, plans, slots, chunk, rate):
    runs = alone(case, backend, plans)
    with oracle_of(case, plans, runs, rate), mock.patch.object(drafting, "WINDOW", 7):
        together = played(LocalRunner(model(case, backend)), case, plans, slots, chunk)
    for plan, events, expected in zip(plans, together, runs, strict=True):
        check(case, plan, events, expected, backend.dtype)


def test_right_drafts_are_accepted(backend):
    """If all drafts are right, k in each call, a text of n tokens takes n / (k + 1) calls."""
    case = Case(layers="M*", mtp_layers="*E", batch=1)
    plan = Drafted(9, 13, 0.0, 1, speculate=3)
    runs = alone(case, backend, [plan])
    with oracle_of(case, [plan], runs, 1.0):
        [[*_, end]] = played(LocalRunner(model(case, backend)), case, [plan], 1, 512)
    counts = end.statistics["speculation"]
    assert counts["calls"] == 3 and counts["tokens_per_call"] == 4
    assert counts["accepted_by_position"] == counts["drafted_by_position"] == [3, 3, 3]


class Speculated(Sequences):
    """Sequences whose tokens come from calls with drafts."""

    def join(self, slot: int) -> None:
        ids = self.tokens(int(self.rng.integers(1, 6)))
        [draw] = self.runner.read([Part(slot, ids, How(GREEDY, drafts=True, whole=bool(slot % 2)), True)])
        self.known[slot] = ids
        self.latest = {**getattr(self, "latest", {}), slot: draw.id}

    def speculate(self, slots: list[int], counts: list[int]) -> None:
        runs = self.runner.speculate(slots, [self.latest[slot] for slot in slots], counts)
        kept = [int(self.rng.integers(1, len(run.draws) + 1)) for run in runs]
        self.runner.keep(slots, kept)
        for slot, run, count in zip(slots, runs, kept, strict=True):
            drawn = [draw.id for draw in run.draws[:count]]
            self.known[slot] = [*self.known[slot], self.latest[slot], *drawn[:-1]]
            self.latest[slot] = drawn[-1]
            assert self.runner.drawings[slot].ids == [*self.known[slot], self.latest[slot]]

    def plain(self, slots: list[int]) -> None:
        draws = self.runner.step(slots, [self.latest[slot] for slot in slots])
        for slot, draw in zip(slots, draws, strict=True):
            self.known[slot] = [*self.known[slot], self.latest[slot]]
            self.latest[slot] = draw.id


@given(
    case=cases(max_length=1, mtp_layers="*E"),
    turns=st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=5),
    rate=st.sampled_from((0.5, 1.0)),
)
def test_after_accepts_and_rejects_the_state_is_that_of_plain_decoding(backend, case, turns, rate):
    """Slots draft and step in any combination; the logits after it are those of the kept tokens."""
    sequences = Speculated(backend, case)
    for slot in range(3):
        sequences.join(slot)

    exact, rng = model(case, numpy_backend(np.float64)), case.rng(17)

    def right(logits, sampling, seen, generator):
        """Return the next token that the model draws, or another one."""
        token = int(np.argmax(LocalRunner(exact).logits(seen)[-1]))
        token = token if rng.random() < rate else (token + 1) % case.cfg.vocab_size
        return drafting.Guess(token, *drafting.NOTHING)

    with mock.patch.object(drafting, "guess", right):
        for drafts, most in turns:
            slots = sequences.some(3)
            if drafts:
                sequences.speculate(slots, [most] * len(slots))
            else:
                sequences.plain(slots)
    sequences.verify([2, 0, 1], [sequences.tokens(2) for _ in range(3)])


@pytest.mark.parametrize("kind", ["whole", "window"])
def test_the_head_reads_every_row_from_the_trunk(kind):
    """Its cache after pieces, accepts and rejects equals that of one call over the whole sequence."""
    backend = numpy_backend(np.float64)
    case = Case(layers="M*", mtp_layers="*E", batch=1)
    m = model(case, backend)
    runner, seen = LocalRunner(m), []
    ids = case.rng(3).integers(0, 61, 9).tolist()
    how = How(GREEDY, drafts=True, whole=kind == "whole")
    runner.read([Part(0, ids[:5], how, False)])
    runner.read([Part(0, ids[5:], None, True)])
    rng = np.random.default_rng(4)

    def noted(logits, sampling, before, generator):
        if len(before) == len(runner.drawings[0].ids):
            seen.append((len(before), logits))
        return drafting.Guess(int(rng.integers(61)), *drafting.NOTHING)

    def plain_text(logits, sampling, before, generator):
        made = noted(logits, sampling, before, generator)
        truth = LocalRunner(m).logits(before)[-1]
        return made if rng.random() < 0.3 else made._replace(token=int(np.argmax(truth)))

    with mock.patch.object(drafting, "guess", plain_text):
        for _ in range(6):
            [run] = runner.speculate([0], [runner.drawings[0].ids[-1]], [3])
            runner.keep([0], [len(run.draws)])
    ids = runner.drawings[0].ids
    h, _ = m.blocks(m.embed(np.array([ids[:-1]])), m.new_states(1))
    o, _ = mtp.predict(m, h, np.array([ids[1:]]), mtp.new_states(m, 1))
    expected = m.head(o)[0]
    assert len(seen) == 6
    for length, logits in seen:
        np.testing.assert_allclose(logits, expected[length - 2], atol=1e-9)

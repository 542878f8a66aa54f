"""Checks of speculation: drafts of the prediction head, calls of which a part is kept, and acceptance."""

from __future__ import annotations

import numpy as np

from refengine.conformance.cases import agree, terms
from refengine.conformance.checks import check, expect, readings
from refengine.conformance.checks.laws import whole
from refengine.conformance.checks.models import HEAD
from refengine.conformance.truth import counted, model, truth, truth_of, watched
from refengine.runner import How, LocalRunner, Part
from refengine.spec import mtp, sample
from refengine.spec.model import Model
from refengine.spec.numerics import tolerance
from refengine.spec.ops import DEFINITION, numpy_backend
from refengine.spec.sample import Sampling
from refengine.speculation import acceptance
from refengine.speculation.acceptance import Guess

GREEDY = Sampling(temperature=0)
NOTHING = np.array([], np.int64), np.array([])


def drafted(st) -> dict:
    """Return strategies: a model with a head, and after how many rows each of some drafts begins."""
    from refengine.conformance.strategies import cases

    case = cases(st.sampled_from(("M", "*", "M-")), max_length=12, mtp_layers="*E", batch=1)
    return {"case": case, "rows": st.lists(st.integers(1, 4), min_size=1, max_size=4)}


@check("speculation", whole(drafted), uses=HEAD)
def drafts_begin_from_rows_of_the_trunk_and_go_on_from_the_heads_own(backend, case, rows):
    """Check the logits of three drafts after each of several calls, of which no provisional row is kept."""
    m, size = model(case, backend), terms(case.cfg, case.length + 3)
    ops, margins, _ = watched(DEFINITION, 0)
    exact, true = Model.build(case.cfg, case.read, numpy_backend(np.float64, ops=ops)), truth(case, 0)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(1))
    reading, _ = readings.head(case, 0)
    next_ids, states, at = np.roll(case.ids, -1, axis=1), mtp.new_states(m, 1), 0
    for count in rows:
        end, found = min(case.length, at + count), []
        if at == end or counted(true.sure(backend.dtype, size) < end):
            break
        given = case.rng(23, at).integers(0, case.cfg.vocab_size, 3)

        def choose(logits, found=found, given=given):
            found.append(logits[0])
            return [given[len(found) - 1]]

        states = mtp.draft(m, h[:, at:end], next_ids[:, at:end], states, 3, choose)
        inputs, ids = true.hidden[None, :end], next_ids[:, :end]
        for ahead, logits in enumerate(found):
            margins.clear()
            o, _ = mtp.predict(exact, inputs, ids, mtp.new_states(exact, 1))
            if counted(min(margin.min() for margin in margins) <= 4 * tolerance(backend.dtype, size)):
                break
            expected = exact.head(o)[0, -1] if ahead else reading[end - 1]
            agree(logits, expected, backend.dtype, size, f"draft {ahead + 1} after {end}", true.stretch)
            inputs = np.concatenate([inputs, o[:, -1:]], axis=1)
            ids = np.concatenate([ids, [[given[ahead]]]], axis=1)
        at = end


def turns(st) -> dict:
    """Return strategies: a model with a head, and the drafts of each turn."""
    from refengine.conformance.strategies import cases

    case = cases(st.sampled_from(("M", "M*", "*M-")), max_length=5, mtp_layers="*E")
    return {"case": case, "drafts": st.lists(st.integers(0, 4), min_size=1, max_size=4)}


@check("speculation", whole(turns), uses=HEAD)
def a_call_with_drafts_is_so_many_steps(backend, case, drafts):
    """Check the logits after calls of which all, a part or none of the drafts were right, and were kept."""
    runner, rng = LocalRunner(model(case, backend)), case.rng(29)
    slots = list(range(case.batch))
    parts = [Part(slot, case.ids[slot].tolist(), How(GREEDY, drafts=True), True) for slot in slots]
    latest = [draw.id for draw in runner.read(parts)]
    read = [case.ids[slot].tolist() for slot in slots]

    def one(slot, logits, before):
        seen = [*read[slot], latest[slot], *(draft.token for draft in before)]
        best = int(truth_of(case, np.array([seen])).logits[-1].argmax())
        return Guess(best if rng.random() < 0.6 else (best + 1) % case.cfg.vocab_size, *NOTHING)

    runner.drafter.one = one  # type: ignore[method-assign]
    for count in drafts:
        runs = runner.speculate(slots, latest, [count] * len(slots))
        kept = [int(rng.integers(1, len(run.draws) + 1)) for run in runs]
        runner.keep(slots, kept)
        for slot, run in zip(slots, runs, strict=True):
            ids = [draw.id for draw in run.draws[: kept[slot]]]
            read[slot] = [*read[slot], latest[slot], *ids[:-1]]
            latest[slot] = ids[-1]
    for slot, logits in zip(slots, runner.verify(slots, [[token] for token in latest]), strict=True):
        ids = [*read[slot], latest[slot]]
        true, size = truth_of(case, np.array([ids])), terms(case.cfg, len(ids))
        if not counted(true.sure(backend.dtype, size) < len(ids)):
            agree(logits[-1], true.logits[-1], backend.dtype, size, f"after {len(ids)}", true.stretch)


def sides() -> dict:
    """Return strategies: the temperature and top_k of both sides, the number of tokens, a seed."""
    from hypothesis import strategies as st

    return {
        "seed": st.integers(0, 9999),
        "size": st.integers(1, 6),
        "temperature": st.sampled_from((0.3, 1.0, 3.0)),
        "top_k": st.sampled_from((0, 2)),
    }


class Given(np.random.Generator):
    """A random generator that gives these numbers, one after the other."""

    def __init__(self, *numbers: float):
        super().__init__(np.random.PCG64(0))
        self.numbers = list(numbers)

    def random(self, *size) -> float:  # type: ignore[override]
        """Return the next number."""
        return self.numbers.pop(0)


GRID = (np.arange(200) + 0.5) / 200


@check("sampling", sides)
def a_draft_is_kept_or_replaced_so_that_the_distribution_stays(backend, seed, size, temperature, top_k):
    """Check accept(p, q, draft, generator), integrated over its two random numbers and all drafts."""
    rng, accept = np.random.default_rng(seed), backend.functions.get("accept", acceptance.accept)
    p = sample.probabilities(rng.normal(size=size), Sampling(top_k=top_k), [])
    q = sample.probabilities(rng.normal(size=size), Sampling(temperature, top_k), [])
    found = np.zeros(size)
    for draft in np.flatnonzero(q):
        shares = np.zeros(size)
        for u in GRID:
            shares[int(accept(p, q, int(draft), Given(u, 0.5, 0.5)))] += 1 / len(GRID)
        lost = 1 - shares[draft]
        found[draft] += q[draft] * shares[draft]
        if lost > 1e-9:
            for u in GRID:
                found[int(accept(p, q, int(draft), Given(1 - 1e-12, u, u)))] += q[draft] * lost / len(GRID)
    expect(np.abs(found - p).max() < 0.02, f"tokens come out with {found.round(3)}, not {p.round(3)}")

"""Recorded calls: several positions are read, and any number of them is kept, without a copy of S."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, agree, cases, terms
from refengine.conformance.truth import agree_with_truth, counted, model, same_states, truth
from refengine.spec import mtp, state
from refengine.spec.numerics import tolerance
from tests.book.test_mtp import read_off

RECORDED = cases(max_length=9)
HEADS = cases(st.sampled_from(("M", "*", "M-")), max_length=6, mtp_layers="*E")


class Recorded:
    """A model that has read `before` of each sequence in a case, and recorded the `k` tokens after them."""

    def __init__(self, backend, case: Case, read: int, k: int):
        self.backend, self.case, self.model, self.rng = backend, case, model(case, backend), case.rng(11)
        self.before = np.minimum(self.rng.integers(0, read + 1, case.batch), case.length)
        self.k = np.clip(case.length - self.before, 0, k)
        self.states = self.model.new_states(case.batch)
        if self.before.any():
            _, self.states = self.feed(self.states, np.zeros_like(self.before), self.before)
        self.logits, self.records = self.feed(self.states, self.before, self.k, record=True)

    def feed(self, states, start, lengths, **how):
        """Return logits and next states after lengths[b] tokens of each sequence from start[b] on."""
        at = start[:, None] + np.arange(max(1, int(lengths.max(initial=0))))
        ids = np.take_along_axis(self.case.ids, np.minimum(at, self.case.length - 1), axis=1)
        give, m = self.backend.array, self.model
        h, states = m.blocks(m.embed(give(ids)), states, give(lengths), **how)
        return self.backend.fetch(m.head(h)), states

    def counts(self, j: int) -> np.ndarray:
        """Return counts: j for the first row, or as many as it has, and any for the others."""
        counts = self.rng.integers(0, self.k + 1)
        counts[0] = min(j, self.k[0])
        return counts

    def check(self, states, read) -> None:
        """The states are those after read[b] tokens of each sequence, and so are the logits that follow."""
        for row in range(self.case.batch):
            same_states(self.case, row, states, self.backend, int(read[row]))
        more = np.minimum(self.case.length - read, 1)
        logits, _ = self.feed(states, read, more)
        for row in np.flatnonzero(more):
            at = slice(int(read[row]), int(read[row]) + 1)
            agree_with_truth(self.case, row, logits[row, :1], self.backend.dtype, at=at)


@given(case=RECORDED, read=st.integers(0, 5), k=st.integers(1, 5))
@example(case=Case(layers="M*EM", length=9, batch=3), read=4, k=4)
@example(case=Case(layers="M*", length=40, batch=2), read=3, k=20)
def test_a_recorded_call_kept_up_to_any_position_is_so_many_steps(backend, case, read, k):
    """One call serves every count, each on a fork of the states, and all of them go on after the last."""
    call = Recorded(backend, case, read, k)
    for row in range(case.batch):
        at = slice(int(call.before[row]), int(call.before[row] + call.k[row]))
        agree_with_truth(case, row, call.logits[row, : call.k[row]], backend.dtype, at=at)
    kept = []
    for j in range(int(call.k[0]) + 1):
        counts = call.counts(j)
        states = call.model.commit(state.fork(call.states), call.records, counts)
        kept.append((states, call.before + counts))
    for states, there in kept:
        call.check(states, there)


@given(case=RECORDED, read=st.integers(0, 5), k=st.integers(1, 5))
@example(case=Case(layers="M*EM", length=9, batch=3), read=4, k=4)
def test_a_record_that_is_not_kept_changes_nothing(backend, case, read, k):
    call = Recorded(backend, case, read, k)
    call.check(call.states, call.before)


@given(case=RECORDED, k=st.integers(1, 5))
def test_calls_recorded_and_kept_one_after_another_read_the_sequence(backend, case, k):
    """Speculation: a call of some guesses, a part of them kept, the next call from there."""
    call = Recorded(backend, case, 0, k)
    read = np.zeros(case.batch, np.int64)
    for j in range(1, 9):
        counts = call.counts(j)
        call.states, read = call.model.commit(call.states, call.records, counts), read + counts
        call.k = np.minimum(case.length - read, k)
        call.logits, call.records = call.feed(call.states, read, call.k, record=True)
        for row in range(case.batch):
            at = slice(int(read[row]), int(read[row] + call.k[row]))
            agree_with_truth(case, row, call.logits[row, : call.k[row]], backend.dtype, at=at)
    call.check(call.states, read)


@given(case=HEADS, read=st.integers(0, 3), j=st.integers(0, 3))
def test_the_prediction_head_keeps_a_part_of_a_recorded_call_too(backend, case, read, j):
    m, next_ids = model(case, backend), backend.array(np.roll(case.ids, -1, axis=1))
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    read, states = min(read, case.length - 1), mtp.new_states(m, case.batch)
    if read:
        _, states = mtp.predict(m, h[:, :read], next_ids[:, :read], states)
    end = min(read + 3, case.length)
    o, records = mtp.predict(m, h[:, read:end], next_ids[:, read:end], states, record=True)
    kept = read + min(j, end - read)
    states = mtp.commit(m, states, records, [kept - read] * case.batch)
    pieces = [(o, slice(read, end))]
    if kept < case.length:
        o, _ = mtp.predict(m, h[:, kept:], next_ids[:, kept:], states)
        pieces.append((o, slice(kept, None)))
    for row in range(case.batch):
        (expected, margin), true, size = read_off(case, row), truth(case, row), terms(case.cfg, case.length)
        if not counted(margin.min() <= tolerance(backend.dtype, size)):
            for o, at in pieces:
                logits = backend.fetch(m.head(o))[row]
                agree(logits, expected[at], backend.dtype, size, f"row {row}", true.stretch)


@given(case=cases("M*", max_length=9), k=st.integers(2, 4))
def test_keeping_a_part_of_a_record_copies_no_cache(backend, case, k):
    """A recorded call and what is kept of it are written where there is room, as single steps are."""
    call = Recorded(backend, case, 1, k)
    states = call.model.commit(call.states, call.records, call.counts(k))
    for _ in range(3):
        _, records = call.feed(states, call.before, np.full(case.batch, k), record=True)
        _, _ = call.feed(states, call.before, np.full(case.batch, k), record=True)
        after = call.model.commit(states, records, call.rng.integers(1, k + 1, case.batch))
        assert not states[1].k.shape[1] or place(after[1].k) == place(states[1].k)
        states = after


def place(array):
    """Return the address of an array of any backend."""
    for name in ("pointer", "data_ptr", "ctypes"):
        if hasattr(array, name):
            found = getattr(array, name)
            return found.data if name == "ctypes" else found() if callable(found) else found
    raise TypeError(type(array))

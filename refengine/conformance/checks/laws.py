"""Laws of whole models: no result depends on the cuts of a sequence, or on the others in its batch.

Each is checked against the truth of a case, the definition in float64 for one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refengine.conformance.cases import Case, agree, cut, terms
from refengine.conformance.checks import check, expect
from refengine.conformance.truth import agree_with_truth, counted, model, same_states, truth, truth_of
from refengine.spec import state

ALL = ("M", "*", "E", "-", "embed", "rms_norm", "logits")
MOVES = ("read", "leave", "join", "fork", "swap", "overwrite")


def whole(more: Callable[..., dict] = lambda st: {}, cuts: bool = False, layers: str | None = None, **how):
    """Return a function that returns strategies: a case of any layers or of these, and those of more(st)."""

    def draws() -> dict:
        from hypothesis import strategies as st

        from refengine.conformance.strategies import ANY_LAYERS, CUTS, cases

        case = cases(layers if layers else ANY_LAYERS, **how)
        return {"case": case} | ({"cuts": CUTS} if cuts else {}) | more(st)

    return draws


@check("resume", whole(cuts=True), uses=ALL,
       examples=({"case": Case(layers="M*-EM", length=9), "cuts": range(9)},))  # fmt: skip
def stopping_and_resuming_changes_nothing(backend, case, cuts):
    """Check the logits of a prompt in pieces, and the states after it."""
    m = model(case, backend)
    states, pieces = m.new_states(case.batch), []
    for piece in cut(case, cuts):
        h, states = m.blocks(m.embed(backend.array(case.ids[:, piece])), states)
        pieces.append(backend.fetch(m.head(h)))
    logits = np.concatenate(pieces, axis=1)
    for row in range(case.batch):
        agree_with_truth(case, row, logits[row], backend.dtype)
        same_states(case, row, states, backend)


@check("padding", whole(lambda st: {"garbage": st.sampled_from((0.0, 1e3, -1e12))}, cuts=True), uses=ALL)
def padding_is_invisible(backend, case, cuts, garbage):
    """Check rows of different lengths: values beyond n[b] never enter a state."""
    m, n, states = model(case, backend), case.lengths, model(case, backend).new_states(case.batch)
    for piece in cut(case, cuts):
        x = backend.fetch(m.embed(backend.array(case.ids[:, piece]))).copy()
        real = np.clip(n - piece.start, 0, x.shape[1])
        x[np.arange(x.shape[1]) >= real[:, None]] = garbage
        h, states = m.blocks(backend.array(x), states, backend.array(real))
        logits = backend.fetch(m.head(h))
        for row in range(case.batch):
            at = slice(piece.start, piece.start + real[row])
            agree_with_truth(case, row, logits[row, : real[row]], backend.dtype, at=at)
    for row in range(case.batch):
        same_states(case, row, states, backend, n[row])


@check("batch", whole(lambda st: {"order": st.permutations(range(3))}), uses=ALL)
def the_company_in_a_batch_and_its_order_do_not_matter(backend, case, order):
    """Check the rows of a batch in another order."""
    m, order = model(case, backend), [row for row in order if row < case.batch]
    h, _ = m.blocks(m.embed(backend.array(case.ids[order])), m.new_states(case.batch))
    for logits, row in zip(backend.fetch(m.head(h)), order, strict=True):
        agree_with_truth(case, row, logits, backend.dtype)


@check("stages", whole(lambda st: {"middle": st.integers(0, 5)}), uses=ALL)
def two_stages_of_some_layers_each_are_the_model(backend, case, middle):
    """Check that layers may be run in two calls, the final norm after the last of all."""
    m, k, count = model(case, backend), min(middle, len(case.layers)), len(case.layers)
    states, x = m.new_states(case.batch), m.embed(backend.array(case.ids))
    h, after = m.blocks(x, states[:k], first=0, last=k) if k else (x, [])
    if k < count:
        h, rest = m.blocks(h, states[k:], first=k)
        expect(len(after) + len(rest) == count, "a state is missing")
        for row in range(case.batch):
            agree_with_truth(case, row, backend.fetch(m.head(h))[row], backend.dtype)
            same_states(case, row, after + rest, backend)


@check("stages", whole(batch=1), uses=ALL)
def a_tap_sees_the_stream_after_each_layer(backend, case):
    """Check the residual stream after each layer, and the hidden after the final norm."""
    m, seen = model(case, backend), []
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(1), tap=lambda i, x: seen.append((i, x)))
    expect([i for i, _ in seen] == list(range(len(case.layers))), "the tap does not see every layer")
    true, size = truth(case, 0), terms(case.cfg, case.length)
    if not counted(true.sure(backend.dtype, size) < case.length):
        found = [(f"stream after layer {i}", x, true.stream[i]) for i, x in seen]
        for what, x, expected in [*found, ("hidden after the final norm", h, true.hidden)]:
            agree(backend.fetch(x)[0], expected, backend.dtype, size, what, true.stretch)


@check("stages", whole(lambda st: {"data": st.integers(0, 999)}), uses=ALL)
def the_head_of_some_rows_is_these_rows_of_the_head(backend, case, data):
    """Check logits of one position of each row, and that they are float32 or wider."""
    m = model(case, backend)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    rows = (data + np.arange(case.batch)) % case.length
    every, some = (
        backend.result(m.head(h), wider=True),
        backend.result(m.head(h, backend.array(rows)), wider=True),
    )
    agree(some, every[np.arange(case.batch), rows], backend.dtype, case.cfg.hidden_size)


class Table:
    """Slots with what each sequence has read, beside the states that ought to remember it."""

    def __init__(self, backend, case: Case):
        self.backend, self.case, self.rng = backend, case, case.rng(7)
        self.model = model(case, backend)
        self.read_so_far: list[list[int]] = [[] for _ in range(case.batch)]
        self.states = self.model.new_states(case.batch)
        self.forks: list = []

    def read(self, at_least: int = 0):
        """Let every sequence read between 0 and 3 tokens more; return logits, and how many each read."""
        slots = len(self.read_so_far)
        n = self.rng.integers(at_least, 4, slots)
        ids = self.rng.integers(0, self.case.cfg.vocab_size, (slots, 3))
        give = self.backend.array
        h, self.states = self.model.blocks(self.model.embed(give(ids)), self.states, give(n))
        self.read_so_far = [self.read_so_far[i] + ids[i, : n[i]].tolist() for i in range(slots)]
        return self.backend.fetch(self.model.head(h)), n

    def choose(self, count: int) -> np.ndarray:
        """Return so many slots, in any order."""
        return self.rng.permutation(len(self.read_so_far))[:count]

    def leave(self):
        """Let one sequence end."""
        self.keep(self.choose(max(1, len(self.read_so_far) - 1)))

    def swap(self):
        """Let all sequences change places."""
        self.keep(self.choose(len(self.read_so_far)))

    def keep(self, rows):
        """Keep these rows, in this order."""
        self.states = state.take(self.states, rows)
        self.read_so_far = [self.read_so_far[row] for row in rows]

    def join(self):
        """Add a slot, as a copy of another into which a new sequence is put."""
        slots = len(self.read_so_far)
        self.keep(np.append(np.arange(slots), 0))
        self.states = state.put(self.states, np.array([slots]), self.model.new_states(1))
        self.read_so_far[slots] = []

    def overwrite(self):
        """Let a sequence go on in the slot of another."""
        source, target = self.choose(1), self.choose(1)
        self.states = state.put(self.states, target, state.take(self.states, source))
        self.read_so_far = list(self.read_so_far)  # a fork may hold the old one
        self.read_so_far[target[0]] = self.read_so_far[source[0]]

    def fork(self):
        """Let all sequences go on twice: the fork waits while the others read, and then reads itself."""
        self.forks.append((state.fork(self.states), self.read_so_far))


def moves(st) -> dict:
    """Return a strategy of what happens to the slots."""
    return {"moves": st.lists(st.sampled_from(MOVES), min_size=1, max_size=8)}


@check("states", whole(moves, max_length=1), uses=ALL,
       examples=({"case": Case(layers="M*", batch=2),
                  "moves": ["read", "fork", "read", "fork", "swap", "read"]},))  # fmt: skip
def sequences_that_join_leave_or_fork_read_as_if_alone(backend, case, moves):
    """Check take, put and fork: each sequence continues, and again after all others have."""
    table = Table(backend, case)
    for move in moves:
        getattr(table, move)()
    everyone = [(table.states, table.read_so_far), *table.forks]
    for i in [*range(len(everyone)), *range(len(everyone))]:
        table.states, table.read_so_far = everyone[i]
        logits, n = table.read(at_least=1)
        everyone[i] = table.states, table.read_so_far
        for row, ids in enumerate(table.read_so_far):
            true, size = truth_of(case, np.array([ids])), terms(case.cfg, len(ids))
            if true.sure(backend.dtype, size) == len(ids):
                last = logits[row, n[row] - 1]
                agree(last, true.logits[-1], backend.dtype, size, f"sequence {row}", true.stretch)


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
        """Check that the states are those after read[b] tokens of each row, and the logits that follow."""
        for row in range(self.case.batch):
            same_states(self.case, row, states, self.backend, int(read[row]))
        more = np.minimum(self.case.length - read, 1)
        logits, _ = self.feed(states, read, more)
        for row in np.flatnonzero(more):
            at = slice(int(read[row]), int(read[row]) + 1)
            agree_with_truth(self.case, row, logits[row, :1], self.backend.dtype, at=at)

    def check_logits(self, read) -> None:
        """Check the logits of the recorded call, which began after read[b] tokens."""
        for row in range(self.case.batch):
            at = slice(int(read[row]), int(read[row] + self.k[row]))
            agree_with_truth(self.case, row, self.logits[row, : self.k[row]], self.backend.dtype, at=at)


def recorded(st) -> dict:
    """Return strategies: tokens read before a recorded call, and positions of the call."""
    return {"read": st.integers(0, 5), "k": st.integers(1, 5)}


@check("records", whole(recorded, max_length=9), uses=ALL,
       examples=({"case": Case(layers="M*EM", length=9, batch=3), "read": 4, "k": 4},
                 {"case": Case(layers="M*", length=40, batch=2), "read": 3, "k": 20}))  # fmt: skip
def a_recorded_call_kept_up_to_any_position_is_so_many_steps(backend, case, read, k):
    """Check every count of one call, each on a fork of the states; all of them go on after the last."""
    call = Recorded(backend, case, read, k)
    call.check_logits(call.before)
    kept = []
    for j in range(int(call.k[0]) + 1):
        counts = call.counts(j)
        states = call.model.commit(state.fork(call.states), call.records, counts)
        kept.append((states, call.before + counts))
    for states, there in kept:
        call.check(states, there)


@check("records", whole(recorded, max_length=9), uses=ALL,
       examples=({"case": Case(layers="M*EM", length=9, batch=3), "read": 4, "k": 4},))  # fmt: skip
def a_record_that_is_not_kept_changes_nothing(backend, case, read, k):
    """Check that a recorded call leaves the states as they were."""
    call = Recorded(backend, case, read, k)
    call.check(call.states, call.before)


@check("records", whole(lambda st: {"k": st.integers(1, 5)}, max_length=9), uses=ALL)
def calls_recorded_and_kept_one_after_another_read_the_sequence(backend, case, k):
    """Check speculation: a call of some guesses, a part of them kept, the next call from there."""
    call = Recorded(backend, case, 0, k)
    read = np.zeros(case.batch, np.int64)
    for j in range(1, 9):
        counts = call.counts(j)
        call.states, read = call.model.commit(call.states, call.records, counts), read + counts
        call.k = np.minimum(case.length - read, k)
        call.logits, call.records = call.feed(call.states, read, call.k, record=True)
        call.check_logits(read)
    call.check(call.states, read)

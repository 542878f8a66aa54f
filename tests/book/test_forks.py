"""Forks of a batch continue in turns, each row by its own number of tokens, without affecting each other.

A fork shares a buffer with the others until it writes. Whether it may write in place depends on every row and
on every turn, not only on the first or the last. Rows may read nothing in a turn.
"""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refengine.conformance.cases import Case, agree, cases, terms
from refengine.conformance.truth import counted, model, truth_of
from refengine.spec import state

TURNS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=3, max_size=3)), min_size=1, max_size=4
)
SECOND_ROW_ONLY = [(0, [0, 1, 0]), (1, [0, 1, 1]), (0, [1, 1, 0]), (1, [1, 0, 1]), (2, [1, 1, 1])]


class Futures:
    """Three forks of a batch that has read a little, and the tokens that each row of each fork has read."""

    def __init__(self, backend, case: Case, start: list[int]):
        self.backend, self.case, self.rng = backend, case, case.rng(17)
        self.model, batch = model(case, backend), len(start)
        states, known = self.model.new_states(batch), [[] for _ in start]
        _, states, known = self.read(states, known, start)
        self.futures = [(states if i == 0 else state.fork(states), list(known)) for i in range(3)]

    def read(self, states, known, n):
        """Feed n[row] tokens to each row; return logits, states and the tokens read."""
        give, width = self.backend.array, max(1, *n)
        ids = self.rng.integers(0, self.case.cfg.vocab_size, (len(n), width))
        h, states = self.model.blocks(self.model.embed(give(ids)), states, give(np.array(n)))
        known = [row + ids[i, : n[i]].tolist() for i, row in enumerate(known)]
        return self.backend.fetch(self.model.head(h)), states, known

    def turn(self, which: int, n: list[int]) -> None:
        """Continue one fork, and check the logits of its rows."""
        states, known = self.futures[which]
        logits, states, known = self.read(states, known, n)
        self.futures[which] = states, known
        for row in np.flatnonzero(n):
            count = n[row]
            true, size = truth_of(self.case, np.array([known[row]])), terms(self.case.cfg, len(known[row]))
            if not counted(true.sure(self.backend.dtype, size) < len(known[row])):
                mine, expected = logits[row, :count], true.logits[-count:]
                agree(mine, expected, self.backend.dtype, size, f"future {which}, row {row}", true.stretch)


@settings(max_examples=6)
@given(
    case=cases(st.sampled_from(("*", "M*", "*M*")), max_length=1),
    start=st.lists(st.integers(0, 3), min_size=3, max_size=3),
    turns=TURNS,
)
@example(case=Case(layers="*"), start=[2, 2, 2], turns=SECOND_ROW_ONLY)
@example(case=Case(layers="*"), start=[0, 3, 1], turns=SECOND_ROW_ONLY)
@example(case=Case(layers="M*"), start=[3, 1, 0], turns=SECOND_ROW_ONLY)
def test_forks_that_go_on_by_turns_do_not_see_each_other(backend, case, start, turns):
    futures = Futures(backend, case, start)
    for which, n in turns:
        futures.turn(which, n)
    for which in range(3):
        futures.turn(which, [1, 1, 1])

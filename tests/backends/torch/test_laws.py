"""The laws of the whole model hold on the torch backend, in every precision.

Every token visits every expert here, so that results can be compared with the definition in float64: a coarse
dtype may choose another expert, which is not rounding. The router has separate tests.
"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import CUTS, cases, cut, terms
from refengine.conformance.truth import truth_of
from refengine.spec import state as spec_state
from refengine.spec.model import Model
from tests.support.torch_benches import TRUTH, on_others
from tests.support.tries import tries

CASES = cases(max_length=14, n_routed_experts=9, num_experts_per_tok=9, n_group=1)


def model(how, case):
    return Model.build(case.cfg, case.read, how() if callable(how) else how)


def step(m, ids, states, n=None):
    """Return the logits of these ids, and the states after them."""
    here = m.backend
    h, states = m.blocks(m.embed(here.array(ids)), states, None if n is None else here.array(n))
    return here.fetch(m.head(h)), states


def truth(case, ids):
    """Return the logits of each sequence alone, read at once, in float64."""
    m = model(TRUTH, case)
    return [step(m, row[None], m.new_states(1))[0][0] for row in ids]


def same(how, case, logits, expected, ids=None):
    """Check equality; more rounding is allowed where the gated norm of a row of `ids` divides by little."""
    stretch = max(truth_of(case, row[None]).stretch for row in (case.ids if ids is None else ids))
    how.near(logits, expected, terms(case.cfg, case.length) if len(expected) else 1, stretch=stretch)


@on_others
@tries(12, 5)
@given(case=CASES, cuts=CUTS)
def test_stopping_and_resuming_changes_nothing(how, case, cuts):
    m, ids = model(how, case), case.ids
    states, pieces = m.new_states(case.batch), []
    for piece in cut(case, cuts):
        logits, states = step(m, ids[:, piece], states)
        pieces.append(logits)
    same(how, case, np.concatenate(pieces, axis=1), np.array(truth(case, ids)))


@on_others
@tries(12, 5)
@given(case=CASES, cuts=CUTS)
def test_padding_is_invisible(how, case, cuts):
    m, ids, n = model(how, case), case.ids.copy(), case.lengths
    ids[np.arange(case.length) >= n[:, None]] = 0
    states, got = m.new_states(case.batch), [[] for _ in n]
    for piece in cut(case, cuts):
        real = np.clip(n - piece.start, 0, piece.stop - piece.start)
        logits, states = step(m, ids[:, piece], states, real)
        for row, k in enumerate(real):
            got[row].append(logits[row, :k])
    for row, expected in enumerate(truth(case, case.ids)):
        same(how, case, np.concatenate(got[row]), expected[: n[row]])


@on_others
@tries(12, 5)
@given(case=CASES, order=st.permutations(range(3)))
def test_sequences_join_and_leave_a_batch(how, case, order):
    """Rows are read in one order and continued in another, the last one alone; results do not change."""
    m, ids, half = model(how, case), case.ids, case.length // 2
    order = [row for row in order if row < case.batch]
    _, states = step(m, ids[:, :half], m.new_states(case.batch)) if half else (None, m.new_states(case.batch))
    expected = np.array(truth(case, ids))
    logits, _ = step(m, ids[order, half:], spec_state.take(states, order))
    same(how, case, logits, expected[order, half:])
    logits, _ = step(m, ids[order[-1:], half:], spec_state.take(states, order[-1:]))
    same(how, case, logits, expected[order[-1:], half:])


@on_others
@tries(12, 5)
@given(case=CASES)
def test_forks_do_not_disturb_each_other(how, case):
    """Three forks of one state continue in turns, a token at a time."""
    m, ids, half = model(how, case), case.ids, case.length // 2
    states = m.new_states(case.batch)
    if half:
        _, states = step(m, ids[:, :half], states)
    futures = [np.concatenate([ids[:, :half], np.roll(ids[:, half:], shift, 1)], 1) for shift in range(3)]
    forks, got = [spec_state.fork(states) for _ in futures], [[], [], []]
    for t in range(half, case.length):
        for i, future in enumerate(futures):
            logits, forks[i] = step(m, future[:, t : t + 1], forks[i])
            got[i].append(logits)
    for future, logits in zip(futures, got, strict=True):
        same(how, case, np.concatenate(logits, 1), np.array(truth(case, future))[:, half:], future)


@on_others
@tries(12, 5)
@given(case=CASES, row=st.integers(0, 2))
def test_a_sequence_takes_the_place_of_another(how, case, row):
    m, ids, half = model(how, case), case.ids, case.length // 2
    row %= case.batch
    _, states = step(m, ids[:, : max(1, half)], m.new_states(case.batch))
    _, newcomer = step(m, ids[row : row + 1], m.new_states(1))
    states = spec_state.put(states, [row], newcomer)
    following = np.roll(ids[:, :1], 1, axis=0)
    logits, _ = step(m, following, states)
    whole = [
        np.concatenate([ids[r] if r == row else ids[r, : max(1, half)], following[r]])
        for r in range(case.batch)
    ]
    for r, sequence in enumerate(whole):
        same(how, case, logits[r], truth(case, sequence[None])[0][-1:], sequence[None])

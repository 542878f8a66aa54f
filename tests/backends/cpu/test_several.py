"""One compiled call reads several positions of several sequences; recorded calls leave states unchanged."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.backends.cpu import cpu_backend, native
from refengine.conformance.cases import Case
from refengine.spec import mtp, state
from refengine.spec.model import Model

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
CASE = Case(layers="M*E-M*", batch=3, length=9, mtp_layers="*E")


def read(case: Case, **how):
    """Return a model and the states after the case's prompts."""
    m = Model.build(case.cfg, case.read, cpu_backend("float32", 2, **how))
    _, states = m.blocks(m.embed(case.ids), m.new_states(case.batch), case.lengths)
    return m, states


def near(mine, theirs, kv=None) -> None:
    """Assert that numbers are near; with `kv` a key may round to its neighbour, which moves a few logits."""
    if kv:
        assert np.sqrt(np.square(np.subtract(mine, theirs)).mean()) <= 3e-3
    limit = 1e-2 if kv else 1e-3
    np.testing.assert_allclose(mine, theirs, rtol=limit, atol=limit)


def mostly_near(mine, theirs) -> None:
    """Assert that nearly all are near: a sum in another order may round to the next of few numbers."""
    far = ~np.isclose(mine, theirs, rtol=1e-3, atol=1e-3)
    assert mine.shape == theirs.shape and far.mean() <= 0.1, (mine[far], theirs[far])


def rows_of(states: list) -> list[int]:
    """Return the addresses of the rows of S and of the tails."""
    return [row.data.ctypes.data for s in states if hasattr(s, "S") for a in (s.tail, s.S) for row in a.rows]


@pytest.mark.parametrize("kv, ssm", [(None, None), ("bfloat16", None), ("fp8", "float16")])
@settings(max_examples=5)
@given(seed=st.integers(0, 99), counts=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_a_compiled_call_of_several_positions_is_so_many_steps(kv, ssm, seed, counts):
    """Rows are ragged, and their first tokens are committed; until then the states do not change."""
    m, states = read(CASE, kv=kv, ssm=ssm)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, CASE.cfg.vocab_size, count).tolist() for count in counts]
    kept = [int(rng.integers(0, count + 1)) for count in counts]
    other = state.take(states, [0, 1, 2])
    logits, hidden, record = m.backend.verify(m, rows, states)
    after = record(states, kept)
    for i, row in enumerate(rows):
        alone = state.take(other, [i])
        for at, token in enumerate(row):
            found, alone = m.backend.step(m, [token], alone)
            if ssm is None:  # float16 steps round S after each position
                near(logits[i][at], found[0], kv)
                near(m.head(hidden[i][None, at : at + 1])[0, 0], found[0], kv)
            if at + 1 == kept[i]:
                mine, theirs = state.take(after, [i]), state.take(alone, [0])
                for one, two in zip(mine, theirs, strict=True):
                    if hasattr(one, "S") and ssm is None:
                        near(np.asarray(one.S), np.asarray(two.S))
                        near(one.tail, two.tail)
                    if hasattr(one, "S") and ssm:
                        assert one.position.tolist() == two.position.tolist()
                    if hasattr(one, "k"):
                        assert one.length.tolist() == two.length.tolist()
                        check = mostly_near if kv else near
                        check(np.asarray(one.k).astype(np.float32), np.asarray(two.k).astype(np.float32))


def test_replayed_positions_are_single_steps_to_the_last_bit():
    """One Mamba layer in the steady mode, in which sums do not depend on the number of rows of a product."""
    case = Case(layers="M", batch=2, length=3)
    m, states = read(case, steady=True)
    other = state.take(states, [0, 1])
    _, _, record = m.backend.verify(m, [[1, 2, 3], [4, 5, 6]], states)
    (after,) = record(states, [3, 2])
    for row, tokens in enumerate(([1, 2, 3], [4, 5])):
        alone = state.take(other, [row])
        for token in tokens:
            _, alone = m.backend.step(m, [token], alone)
        np.testing.assert_array_equal(after.S[row], alone[0].S[0])
        np.testing.assert_array_equal(after.tail[row], alone[0].tail[0])


def test_joins_leaves_and_steps_move_no_state():
    m, states = read(CASE)
    where = rows_of(states)
    _, one = m.blocks(m.embed(np.array([[3]])), m.new_states(1))
    new = rows_of(one)
    both = state.join([states, one], [(1, 0), (0, 2), (0, 0)])
    _, both = m.backend.step(m, [1, 2, 3], both)
    for layer in range(len(new)):
        assert rows_of(both)[3 * layer : 3 * layer + 3] == [
            new[layer],
            where[3 * layer + 2],
            where[3 * layer],
        ]


def test_a_fork_is_copied_when_either_goes_on():
    m, states = read(CASE)
    before = [np.array(s.S) for s in states if hasattr(s, "S")]
    other, where = state.fork(states), rows_of(states)
    _, after = m.backend.step(m, [1, 2, 3], states)
    assert not set(where) & set(rows_of(after)) and rows_of(other) == where
    for s, old in zip([s for s in other if hasattr(s, "S")], before, strict=True):
        np.testing.assert_array_equal(s.S, old)
    taken = state.take(after, [0, 0])
    _, taken = m.backend.step(m, [1, 2], taken)
    assert not set(rows_of(taken)) & set(rows_of(after))


@settings(max_examples=5)
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(0, 4), min_size=2, max_size=3))
def test_drafts_by_a_compiled_call_are_those_of_the_verbs(seed, lengths):
    """Rows of the head are ragged, and some are empty."""
    m, _ = read(CASE)
    b, width, rng = len(lengths), max(1, *lengths), np.random.default_rng(seed)
    h = rng.standard_normal((b, width, CASE.cfg.hidden_size)).astype(np.float32)
    ids = rng.integers(0, CASE.cfg.vocab_size, (b, width))
    told: dict[bool, list] = {}
    for backend in (m.backend, replace(m.backend, predict=None)):
        model, found = replace(m, backend=backend), told.setdefault(backend.predict is None, [])

        def choose(logits, found=found):
            found.append(logits)
            return [5] * b

        states = mtp.new_states(model, b)
        for _ in range(2):
            states = mtp.draft(model, h, ids, states, 3, choose, np.array(lengths))
    real = np.flatnonzero(lengths)
    for mine, theirs in zip(told[False], told[True], strict=True):
        near(mine[real], theirs[real])

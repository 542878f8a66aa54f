"""Tokens that are verified at once and kept in part leave the states of single steps, slot by slot."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, cases
from refengine.runner import How, LocalRunner, Part
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.sample import Sampling
from tests.support.sequences import Sequences


@given(
    case=cases(max_length=1), most=st.integers(1, 5), keeps=st.lists(st.booleans(), min_size=1, max_size=4)
)
def test_what_is_kept_of_verified_tokens_is_so_many_steps(backend, case, most, keeps):
    """Slots are read, verified, kept and stepped in any combination."""
    sequences = Sequences(backend, case)
    sequences.turns(most, keeps)
    sequences.verify([2, 0, 1], [sequences.tokens(1) for _ in range(3)])


def test_only_what_was_verified_can_be_committed(backend):
    sequences = Sequences(backend, Case(layers="M*"))
    sequences.join(0)
    runner = sequences.runner
    with pytest.raises(ValueError, match="verified"):
        runner.commit([0], [1])
    runner.verify([0], [[1, 2]])
    for slots, counts in (([1], [1]), ([0], [3]), ([0], [-1])):
        with pytest.raises(ValueError, match="verified"):
            runner.commit(slots, counts)
    runner.commit([0], [2])
    with pytest.raises(ValueError, match="verified"):
        runner.commit([0], [1])
    sequences.join(1)
    runner.verify([0], [[3]])
    runner.drop([1])
    runner.commit([0], [1])
    runner.verify([0], [[3]])
    runner.step([0], [3], draw=False)
    with pytest.raises(ValueError, match="verified"):
        runner.commit([0], [1])
    runner.verify([0], [[3]])
    runner.drop([0])
    with pytest.raises(ValueError, match="verified"):
        runner.commit([0], [1])


@given(case=cases(max_length=1), turns=st.integers(1, 3))
def test_a_fork_and_its_origin_go_separate_ways(backend, case, turns):
    sequences = Sequences(backend, case)
    sequences.join(4)
    sequences.join(7)
    sequences.fork(4, [1, 2])
    for _ in range(turns):
        sequences.turn([2, 4, 7], 3, True)
        sequences.step([1, 4])
    sequences.leave(4)
    sequences.fork(2, [4])
    sequences.verify([1, 2, 4, 7], [sequences.tokens(2) for _ in range(4)])


def test_a_fork_draws_what_its_origin_draws():
    """Each has a separate generator and tokens, whatever the other has drawn."""
    case = Case(layers="M*")
    runner = LocalRunner(Model.build(case.cfg, case.read, numpy_backend(np.float64)))
    how = How(Sampling(temperature=1.0, repetition_penalty=1.3), seed=5)
    (first,) = runner.read([Part(0, [3, 4], how, True)])
    runner.fork(0, [1])
    texts = []
    for slot in (0, 1):
        text = [first.id]
        for _ in range(8):
            (draw,) = runner.step([slot], text[-1:])
            text.append(draw.id)
        texts.append(text)
    assert texts[0] == texts[1] and len(set(texts[0])) > 3


def test_only_free_slots_are_forked_into(backend):
    sequences = Sequences(backend, Case(layers="M*"))
    sequences.join(0)
    sequences.join(1)
    for slot, into in ((0, [0]), (0, [1]), (2, [3]), (0, [2, 2])):
        with pytest.raises(ValueError, match="fork"):
            sequences.runner.fork(slot, into)
    sequences.step([0, 1])

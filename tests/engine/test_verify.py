"""Several tokens at once, of which a part is kept: the same as so many single steps, slot by slot."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, agree, cases, terms
from refengine.conformance.truth import counted, model, truth_of
from refengine.runner import How, LocalRunner, Part


class Sequences:
    """What each slot of a runner has read, beside the runner."""

    def __init__(self, backend, case: Case):
        self.backend, self.case, self.rng = backend, case, case.rng(13)
        self.runner = LocalRunner(model(case, backend))
        self.known: dict[int, list[int]] = {}

    def tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, self.case.cfg.vocab_size, count).tolist()

    def join(self, slot: int) -> None:
        ids = self.tokens(int(self.rng.integers(1, 6)))
        self.runner.read([Part(slot, ids, How(), True)])
        self.known[slot] = ids

    def verify(self, slots: list[int], ids: list[list[int]]) -> None:
        """Each row of logits is that of the sequence, read alone up to there."""
        for slot, row, logits in zip(slots, ids, self.runner.verify(slots, ids), strict=True):
            self.check(self.known[slot] + row, logits)

    def check(self, ids: list[int], logits: np.ndarray) -> None:
        true, size = truth_of(self.case, np.array([ids])), terms(self.case.cfg, len(ids))
        if not counted(true.sure(self.backend.dtype, size) < len(ids)):
            expected = true.logits[-len(logits) :]
            agree(logits, expected, self.backend.dtype, size, f"after {len(ids)}", true.stretch)

    def turn(self, slots: list[int], most: int, keep: bool) -> None:
        """Verify up to `most` tokens in each of these slots, and keep some of them."""
        ids = [self.tokens(int(self.rng.integers(1, most + 1))) for _ in slots]
        self.verify(slots, ids)
        if keep:
            counts = [int(self.rng.integers(0, len(row) + 1)) for row in ids]
            self.runner.commit(slots, counts)
            for slot, row, count in zip(slots, ids, counts, strict=True):
                self.known[slot] = self.known[slot] + row[:count]

    def step(self, slots: list[int]) -> None:
        ids = self.tokens(len(slots))
        self.runner.step(slots, ids, draw=False)
        for slot, token in zip(slots, ids, strict=True):
            self.known[slot] = [*self.known[slot], token]


@given(
    case=cases(max_length=1), most=st.integers(1, 5), keeps=st.lists(st.booleans(), min_size=1, max_size=4)
)
def test_what_is_kept_of_verified_tokens_is_so_many_steps(backend, case, most, keeps):
    """Slots are read, verified, kept and stepped in any company."""
    sequences = Sequences(backend, case)
    for slot in range(3):
        sequences.join(slot)
    for keep in keeps:
        slots = sequences.rng.permutation(3)[: sequences.rng.integers(1, 4)].tolist()
        sequences.turn(slots, most, keep)
        sequences.step(sequences.rng.permutation(3)[: sequences.rng.integers(1, 4)].tolist())
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

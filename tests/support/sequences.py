"""Sequences in the slots of a runner, each compared with a call over all tokens that it has read."""

from __future__ import annotations

import numpy as np

from refengine.conformance.cases import Case, agree, terms
from refengine.conformance.truth import counted, model, truth_of
from refengine.runner import How, LocalRunner, Part


class Sequences:
    """A record, beside a runner, of the tokens that each slot has read."""

    def __init__(self, backend, case: Case, runner=None):
        self.backend, self.case, self.rng = backend, case, case.rng(13)
        self.runner = runner or LocalRunner(model(case, backend))
        self.known: dict[int, list[int]] = {}

    def fork(self, slot: int, into: list[int]) -> None:
        self.runner.fork(slot, into)
        self.known |= {other: list(self.known[slot]) for other in into}

    def leave(self, slot: int) -> None:
        self.runner.drop([slot])
        del self.known[slot]

    def tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, self.case.cfg.vocab_size, count).tolist()

    def join(self, slot: int) -> None:
        ids = self.tokens(int(self.rng.integers(1, 6)))
        self.runner.read([Part(slot, ids, How(), True)])
        self.known[slot] = ids

    def verify(self, slots: list[int], ids: list[list[int]]) -> None:
        """Check that each row of logits is that of the sequence read alone up to there."""
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

    def some(self, of: int) -> list[int]:
        return self.rng.permutation(of)[: self.rng.integers(1, of + 1)].tolist()

    def turns(self, most: int, keeps: list[bool]) -> None:
        """Read three slots, then verify and step some of them in turns."""
        for slot in range(3):
            self.join(slot)
        for keep in keeps:
            self.turn(self.some(3), most, keep)
            self.step(self.some(3))

    def step(self, slots: list[int]) -> None:
        ids = self.tokens(len(slots))
        self.runner.step(slots, ids, draw=False)
        for slot, token in zip(slots, ids, strict=True):
            self.known[slot] = [*self.known[slot], token]

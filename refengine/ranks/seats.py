"""Assign the sequences of a batch to the ranks of ep: all sequences to every rank, or a part to each."""

from __future__ import annotations

from dataclasses import dataclass

from refengine.spec.layout import span


@dataclass(frozen=True)
class Seats:
    """The sequences of each rank of ep: of[e] lists their numbers in the batch, None for padding."""

    of: tuple[tuple[int | None, ...], ...]

    @classmethod
    def split(cls, batch: int, ep: int) -> Seats:
        """Return the most even split of a batch; fewer sequences than ranks all go to every rank."""
        if ep == 1 or batch < ep:
            return cls((tuple(range(batch)),) * ep)
        return cls(tuple(tuple(span(batch, ep, e)) for e in range(ep)))

    @property
    def repeated(self) -> bool:
        """Return whether every rank has the same sequences."""
        return all(seats == self.of[0] for seats in self.of)

    @property
    def sizes(self) -> list[int]:
        """Return the number of sequences of each rank, padding included."""
        return [len(seats) for seats in self.of]

    def stay(self, rows: list[int]) -> tuple[Seats, list[list[int]]]:
        """Return the seats of the sequences `rows`, renumbered in that order, and what each rank keeps.

        kept[e] indexes the sequences that rank e had. Every rank keeps one, if only as padding, because it
        must take part in the exchanges of the experts.
        """
        number: dict[int | None, int] = {row: i for i, row in enumerate(rows)}
        kept = [[i for i, row in enumerate(seats) if row in number] or [0] for seats in self.of]
        pairs = zip(self.of, kept, strict=True)
        return Seats(tuple(tuple(number.get(seats[i]) for i in mine) for seats, mine in pairs)), kept

"""Which ranks of ep have which sequences of a batch: all have all, or each has its own."""

from __future__ import annotations

from dataclasses import dataclass

from refengine.spec.layout import span


@dataclass(frozen=True)
class Seats:
    """Which sequences of a batch each rank of ep has: their numbers, or None for one kept as padding."""

    of: tuple[tuple[int | None, ...], ...]

    @classmethod
    def split(cls, batch: int, ep: int) -> Seats:
        """In parts as even as can be; all of them for everyone if there are fewer sequences than ranks."""
        if ep == 1 or batch < ep:
            return cls((tuple(range(batch)),) * ep)
        return cls(tuple(tuple(span(batch, ep, e)) for e in range(ep)))

    @property
    def repeated(self) -> bool:
        return all(seats == self.of[0] for seats in self.of)

    @property
    def sizes(self) -> list[int]:
        return [len(seats) for seats in self.of]

    def stay(self, rows: list[int]) -> tuple[Seats, list[list[int]]]:
        """Only `rows` go on, under new numbers: the seats, and which of its own each rank keeps.

        Every rank keeps one, so that it can answer for its experts.
        """
        number = {row: i for i, row in enumerate(rows)}
        kept = [[i for i, row in enumerate(seats) if row in number] or [0] for seats in self.of]
        pairs = zip(self.of, kept, strict=True)
        return Seats(tuple(tuple(number.get(seats[i]) for i in mine) for seats, mine in pairs)), kept

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

    @classmethod
    def of_slots(
        cls, slots: list[int], fresh: list[int], homes: dict[int, int | None], ep: int
    ) -> tuple[Seats, dict[int, int | None]]:
        """Return the seats of a call's sequences, and the home of each slot after it.

        slots: those of the call's rows; fresh: those that have read nothing, and may sit anywhere; homes: the
        rank of ep that has a slot's states, None if all have them. Fewer sequences than ranks go to every
        rank if each rank can have them. Otherwise each goes to its home, or to the rank with the fewest.
        A rank without a sequence gets padding, because it must take part in the exchanges of the experts.
        """
        before = {slot: None if slot in fresh else homes[slot] for slot in slots}
        if ep == 1 or (len(slots) < ep and all(home is None for home in before.values())):
            return cls((tuple(range(len(slots))),) * ep), dict.fromkeys(slots)
        count = [sum(home == e for home in before.values()) for e in range(ep)]
        after: dict[int, int | None] = {}
        for slot, home in before.items():
            if home is None:
                home = count.index(min(count))
                count[home] += 1
            after[slot] = home
        of = [tuple(i for i, slot in enumerate(slots) if after[slot] == e) or (None,) for e in range(ep)]
        return cls(tuple(of)), after

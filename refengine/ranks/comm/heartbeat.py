"""Signs of life: how a rank that waits knows which other is gone, and which is only slow.

A rank says now and then, four times within the patience of the others, how many exchanges it has done and for
whom it waits; for nobody if it is at work. Whoever waits for it goes on as long as it, or one that it waits
for, perhaps by way of others, gets on. So patience is the time without a sign, not that of a computation. A
rank that is dead or stopped gives none; and ranks that all wait for each other do not get on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from time import monotonic


class Signs:
    """What a rank has heard of the others."""

    def __init__(self, rank: int, patience: float):
        self.rank, self.patience = rank, patience
        self.done = 0  # exchanges of this rank
        self.given, self.told = 0, monotonic()  # signs, and when the last
        self.seen: dict[int, float] = {}  # when a rank gave its last sign
        self.said: dict[int, list[int]] = {}  # that sign: its number, exchanges, and for whom it waited
        self.moved: dict[int, float] = {}  # when it was last known to get on

    def sign(self, waits: Iterable[int] = ()) -> str:
        """What to tell the others now, if it is time; ask as often as you like."""
        now = monotonic()
        if now - self.told < self.patience / 4:
            return ""
        self.given, self.told = self.given + 1, now
        return " ".join(map(str, (self.given, self.done, *waits)))

    def hear(self, rank: int, sign: str) -> None:
        """A sign, perhaps not for the first time."""
        now, said = monotonic(), [int(number) for number in sign.split()]
        before = self.said.get(rank, [0, -1])
        if said[0] != before[0]:
            self.seen[rank], self.said[rank] = now, said
            if len(said) == 2 or said[1] != before[1]:
                self.moved[rank] = now

    def lost(self, peers: Collection[int], since: float) -> list[int]:
        """Whom to blame, if this rank has waited for `peers` since then; nobody while there is hope."""
        latest = monotonic() - self.patience
        if since > latest:
            return []
        waits = {rank: said[2:] for rank, said in self.said.items() if self.seen[rank] > latest and said[2:]}
        hopeless = [
            peer
            for peer in peers
            if all(self.moved.get(rank, 0) <= latest for rank in reached([peer], waits) if rank != self.rank)
        ]
        return culprits(hopeless, waits | {self.rank: list(peers)}) if hopeless else []


def reached(peers: Iterable[int], waits: dict[int, list[int]]) -> list[int]:
    """The peers, those for whom they wait, those for whom these wait, and so on."""
    found = list(peers)
    for rank in found:
        found += [other for other in dict.fromkeys(waits.get(rank, ())) if other not in found]
    return found


def culprits(peers: Iterable[int], waits: dict[int, list[int]]) -> list[int]:
    """Whom one waits for in vain, perhaps by way of others: of `waits`, who waits for whom, the ends."""
    return sorted(set(reached(peers, waits)) - waits.keys()) or sorted(peers)

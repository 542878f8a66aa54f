"""Heartbeats: they let a waiting rank distinguish a dead peer from a slow one.

Every rank sends a heartbeat four times within the timeout. It holds the number of the heartbeat, the number
of exchanges that the rank has completed, and the ranks for which it waits (none while it computes). A peer
makes progress if it computes or if its number of exchanges grew. A rank keeps waiting while its peer, or any
rank for which that peer waits directly or through others, makes progress: the timeout bounds the time without
progress, not the time of a computation. A dead or stopped rank sends no heartbeat, and ranks that all wait
for each other make no progress.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from time import monotonic


class Heartbeat:
    """Send this rank's heartbeats, record those of the other ranks, and decide which peers are dead.

    `timeout` is in seconds. `exchanges` is the number of exchanges that this rank has completed; its
    connection counts them.
    """

    def __init__(self, rank: int, timeout: float):
        self.rank, self.timeout = rank, timeout
        self.exchanges = 0
        self.sent, self.sent_at = 0, monotonic()
        self.latest: dict[int, list[int]] = {}  # by rank: number of the heartbeat, exchanges, ranks awaited
        self.received_at: dict[int, float] = {}  # by rank: time of its latest heartbeat
        self.progress_at: dict[int, float] = {}  # by rank: time of its latest heartbeat that showed progress

    @property
    def due(self) -> bool:
        """Return whether the next heartbeat is due: a quarter of the timeout after the last."""
        return monotonic() - self.sent_at >= self.timeout / 4

    def beat(self, awaited: Iterable[int] = ()) -> str:
        """Return the heartbeat to send to all ranks, or "" if none is due; `awaited`: ranks waited for."""
        if not self.due:
            return ""
        self.sent, self.sent_at = self.sent + 1, monotonic()
        return " ".join(map(str, (self.sent, self.exchanges, *awaited)))

    def receive(self, rank: int, beat: str) -> None:
        """Record a heartbeat of `rank`; one that was recorded before changes nothing."""
        now, numbers = monotonic(), [int(number) for number in beat.split()]
        before = self.latest.get(rank, [0, -1])
        if numbers[0] != before[0]:
            self.received_at[rank], self.latest[rank] = now, numbers
            if len(numbers) == 2 or numbers[1] != before[1]:
                self.progress_at[rank] = now

    def dead(self, peers: Collection[int], since: float) -> list[int]:
        """Return the ranks considered dead by this one, which has waited for `peers` since that time.

        Empty while every awaited peer still makes progress, itself or through a rank that it waits for.
        """
        limit = monotonic() - self.timeout
        if since > limit:
            return []
        waits = {
            rank: beat[2:]
            for rank, beat in self.latest.items()
            if self.received_at[rank] > limit and beat[2:]
        }
        stuck = [
            peer
            for peer in peers
            if all(
                self.progress_at.get(rank, 0) <= limit for rank in reached([peer], waits) if rank != self.rank
            )
        ]
        return ends(stuck, waits | {self.rank: list(peers)}) if stuck else []


def reached(peers: Iterable[int], waits: dict[int, list[int]]) -> list[int]:
    """Return `peers` and all ranks that they wait for, directly or not; waits[rank]: ranks awaited."""
    found: list[int] = []
    waiting = list(peers)
    while waiting:
        rank = waiting.pop(0)
        if rank not in found:
            found.append(rank)
            waiting += waits.get(rank, ())
    return found


def ends(peers: Iterable[int], waits: dict[int, list[int]]) -> list[int]:
    """Return the ranks at the ends of the chains of waiting that begin at `peers`, sorted.

    An end waits for no rank. Where there is none, because ranks wait for each other, `peers` are returned.
    """
    return sorted(set(reached(peers, waits)) - waits.keys()) or sorted(peers)

"""Choose the number of drafts from the measured time of calls and the measured acceptance.

A call with k drafts takes c(k) seconds, c(0) a plain step, and draws 1 + a1 + a1 a2 + ... + a1..ak tokens,
if a draft that is reached at position i is accepted with probability ai. `auto` chooses the k with most
tokens a second, of all sequences of the call together, since their rows are padded to one length. Acceptance
is that of the sequence, drawn towards that of all; times are those of calls of as many sequences.

Drafts that do not pay cost time, and whether they pay is known only by drafting. The time that is lost to
trials is kept below a share of the time that decoding has taken and will take.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from refengine.spec.config import InputError
from refengine.speculation.acceptance import Run

MOST = 8  # drafts that `auto` makes at most
FIRST = 2  # drafts of a trial, while no call with any has been measured
KEPT = 32  # measured times of a kind of call
KNOWN = 8  # plain calls that are measured before any trial
AGAIN = 64  # calls with drafts after which a plain one is measured again
PAUSE = 31  # plain calls after drafts have been found not to pay: the choice takes a tenth of a millisecond
LOST = 0.015  # share of the time of decoding that trials may lose
GAIN = 1.02  # tokens a second, over those of plain steps, from which drafts are made
PRIOR, WEIGHT = 0.7, 3.0  # acceptance before any draft, and the number of drafts that it counts as
FADES = 0.97  # weight of what was counted before the latest draft


@dataclass
class Acceptance:
    """Counts accepted drafts by position.

    others: of all sequences, towards which the estimates of one are drawn.
    """

    others: Acceptance | None = None
    tried: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def note(self, run: Run) -> None:
        """Count the drafts of a run that were reached, and those that were accepted."""
        for position in range(min(run.drafts, run.accepted + 1)):
            if position == len(self.tried):
                self.tried.append(0.0)
                self.right.append(0.0)
            self.tried[position] = self.tried[position] * FADES + 1
            self.right[position] = self.right[position] * FADES + (position < run.accepted)
        if self.others:
            self.others.note(run)

    def rate(self, position: int) -> float:
        """Return the probability that the draft at a position is accepted once it is reached."""
        if self.others:
            before = self.others.rate(position)
        else:
            before = self.rate(position - 1) if position else PRIOR
        if position >= len(self.tried):
            return before
        return (self.right[position] + WEIGHT * before) / (self.tried[position] + WEIGHT)

    def tokens(self, drafts: int) -> float:
        """Return how many tokens a call with so many drafts draws on average."""
        total = reached = 1.0
        for position in range(drafts):
            reached *= self.rate(position)
            total += reached
        return total


@dataclass
class Tally:
    """Counts the calls and drafts of one sequence."""

    calls: int = 0
    tokens: int = 0  # drawn in these calls
    drafted: list[int] = field(default_factory=list)  # by position
    accepted: list[int] = field(default_factory=list)

    def note(self, run: Run) -> None:
        """Count a run."""
        self.calls, self.tokens = self.calls + 1, self.tokens + len(run.draws)
        more = run.drafts - len(self.drafted)
        self.drafted += [0] * more
        self.accepted += [0] * more
        for position in range(run.drafts):
            self.drafted[position] += 1
            self.accepted[position] += position < run.accepted

    def statistics(self) -> dict:
        """Return the counts, and tokens a call."""
        return {
            "calls": self.calls,
            "tokens": self.tokens,
            "tokens_per_call": self.tokens / self.calls if self.calls else None,
            "drafted_by_position": self.drafted,
            "accepted_by_position": self.accepted,
        }


def median(values: Sequence[float]) -> float:
    """Return the middle value; statistics, with fractions and decimal, is imported when it is needed."""
    import statistics

    return statistics.median(values)


class Waits(Protocol):
    """A sequence that waits for its next call."""

    acceptance: Acceptance

    @property
    def drafts(self) -> int | str | None:
        """Return the option: a number, "auto" or None."""
        ...

    @property
    def rest(self) -> int:
        """Return how many tokens may still be drawn."""
        ...


class Pace:
    """Chooses how many drafts the sequences of a call have, and measures the calls."""

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        self.acceptance = Acceptance()  # of all sequences
        self.times: dict[
            tuple[int, int], deque[float]
        ] = {}  # by sequences and drafts; -1: a call without any
        self.total = 0.0  # seconds of all calls
        self.lost = 0.0  # of them to trials
        self.drafted = 0  # calls with drafts since the latest plain one
        self.pause = 0, 0  # sequences of a call, and calls of as many that make no drafts without weighing it

    def counts(self, ready: Sequence[Waits]) -> list[int]:
        """Return how many drafts each sequence is to have, fewer than the tokens it may still draw."""
        size, pause = self.pause
        if pause and size == len(ready) and all(one.drafts == "auto" for one in ready):
            self.pause = size, pause - 1
            return [0] * size
        fixed = [min(one.drafts, one.rest - 1) if isinstance(one.drafts, int) else 0 for one in ready]
        auto = [one for one in ready if one.drafts == "auto"]
        if not auto:
            return fixed
        chosen = max([self.best(ready, auto), *fixed])
        return [
            min(chosen, MOST, one.rest - 1) if one.drafts == "auto" else count
            for one, count in zip(ready, fixed, strict=True)
        ]

    def best(self, ready: Sequence[Waits], auto: Sequence[Waits]) -> int:
        """Return the number of drafts that draws most tokens a second; 0: plain steps."""
        size, most = len(ready), min(MOST, max(one.rest for one in auto) - 1)
        plain = self.seconds(size, 0)
        if plain is None or most < 1 or self.drafted >= AGAIN or self.plain_calls < KNOWN:
            return 0
        took = {drafts: self.seconds(size, drafts) or 0.0 for drafts in range(1, most + 1)}
        plain = min([plain, *filter(None, took.values())])  # a plain call does less: then it was held up
        speeds = {0: size / plain * GAIN}
        for drafts in filter(took.get, took):
            tokens = sum(one.acceptance.tokens(min(drafts, one.rest - 1)) for one in auto)
            speeds[drafts] = (tokens + size - len(auto)) / took[drafts]
        drafts = max(speeds, key=lambda k: speeds[k])
        drafts = drafts or self.trial(size, min(most, FIRST), plain, sum(one.rest for one in auto) / size)
        self.pause = size, 0 if drafts else PAUSE
        return drafts

    @property
    def plain_calls(self) -> int:
        """Return how many measured times of plain calls are kept."""
        return sum(len(times) for (_, drafts), times in self.times.items() if drafts == 0)

    def trial(self, size: int, drafts: int, plain: float, rest: float) -> int:
        """Return a number of drafts to try where none seem to pay, or 0; rest: tokens to be drawn by each."""
        known = [k for (b, k), times in self.times.items() if b == size and k > 0 and times]
        drafts = min(known, key=lambda k: self.seconds(size, k) or 0) if known else drafts
        took = self.seconds(size, drafts)
        without = self.times.get((size, -1))  # calls that opened a row and had no drafts
        loss = took - plain if took else 2 * max(plain, median(without) if without else 0.0)
        future = 0.0 if took else plain * min(rest, 256)
        return drafts if self.lost + loss <= LOST * (self.total + future) else 0

    def seconds(self, size: int, drafts: int) -> float | None:
        """Return the seconds of a call of `size` sequences with so many drafts, as far as that is known."""
        if times := self.times.get((size, drafts)):
            return sorted(times)[len(times) // 4]  # other work only ever makes a call slower
        measured = sorted(k for (b, k), times in self.times.items() if b == size and times and k > 0)
        if drafts and measured:
            near = min(measured, key=lambda k: abs(k - drafts))
            other = min((k for k in measured if k != near), key=lambda k: abs(k - drafts), default=0)
            here, there = self.seconds(size, near), self.seconds(size, other)
            if here and there:
                slope = max(0.02 * here, (here - there) / (near - other)) if near != other else 0.0
                return max(0.5 * here, here + slope * (drafts - near))
            return here
        sizes = [b for (b, k), times in self.times.items() if k == drafts and times]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda b: abs(b - size))
        plain, theirs = self.times.get((size, 0)), self.times.get((nearest, 0))
        scale = median(plain) / median(theirs) if drafts and plain and theirs else max(1.0, size / nearest)
        return scale * median(self.times[nearest, drafts])

    def step(self, runner, slots: list[int], ids: list[int]) -> list:
        """Return the draws of a plain step, which is measured."""
        began = self.clock()
        draws = runner.step(slots, ids)
        self.measured(len(slots), 0, self.clock() - began, len(slots))
        return draws

    def speculate(
        self, runner, slots: list[int], ids: list[int], counts: list[int]
    ) -> tuple[list[Run | InputError], float]:
        """Return the runs of a call with drafts, and its seconds so far."""
        began = self.clock()
        return runner.speculate(slots, ids, counts), self.clock() - began

    def keep(self, runner, slots: list[int], runs: list, counts: list[int], took: float) -> None:
        """Keep the first of the tokens that were drawn, and note the call's time."""
        began = self.clock()
        runner.keep(slots, counts)
        known = [run for run in runs if isinstance(run, Run)]
        drafts = max((run.drafts for run in known), default=0)
        late = max((run.rows for run in known), default=0) > 2 * MOST  # the head has read a prompt first
        self.measured(len(slots), drafts or -1, took + self.clock() - began, sum(counts), late)

    def measured(self, size: int, drafts: int, took: float, tokens: int, late: bool = False) -> None:
        """Note the seconds of a call, and the tokens that it drew; late: it did more than such calls do."""
        self.total += took
        self.drafted = 0 if drafts == 0 else self.drafted + 1
        if late:
            return
        self.times.setdefault((size, drafts), deque(maxlen=KEPT)).append(took)
        if drafts and (plain := self.seconds(size, 0)):
            self.lost = max(0.0, self.lost + took - plain * tokens / size)

"""Drafts for a runner's sequences: rows that the head has yet to read, guesses, and calls that verify them.

Row i of the head needs the trunk's hidden state h[i] and the next token t[i + 1], so it is one token behind.
A sequence's rows that the head has not read yet wait here, with their hidden states on the host:

    h[i]    h[i+1]  ...  h[n-1]
    t[i+1]  t[i+2]  ...  open: its token is the one that is drawn last and fed next

`speculate` gives the open row its token, lets the head read all rows that wait, and guesses from the last of
them. The trunk then reads the token and the guesses in a recorded call; `keep` replays those that were
accepted, and their hidden states become rows that wait. A step of the compiled loops gives no hidden state:
it leaves no open row, so the next call has no drafts, and opens one. The head's cache then lacks the rows of
such steps, which costs it accuracy and nothing else: no position is encoded.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import proxy

import numpy as np

from refengine.spec import mtp, state
from refengine.spec.config import InputError
from refengine.spec.sample import Sampling
from refengine.speculation.acceptance import Guess, Run, accepted, guess

if TYPE_CHECKING:
    from refengine.runner import LocalRunner, Slots

WINDOW = 256  # rows that wait, at most, of a sequence that may never draft


@dataclass
class Waiting:
    """The rows of one sequence that the head has not read.

    whole: whether the head reads all of a prompt; if not, only the last WINDOW rows wait.
    hidden: on ranks that have the sequence and the trunk's last layer; every rank knows `count` and `tokens`.
    """

    whole: bool
    generator: np.random.Generator  # of the drafts; the tokens that are drawn have another
    count: int = 0
    tokens: list[int] = field(default_factory=list)  # t[i + 1] of each row, without that of an open row
    hidden: np.ndarray | None = None  # rows d

    @property
    def open(self) -> bool:
        """Return whether the last row has no token yet."""
        return len(self.tokens) < self.count

    def close(self, token: int) -> bool:
        """Give the open row its token; return whether there was one."""
        was_open = self.open
        if was_open:
            self.tokens.append(token)
        return was_open

    def add(self, ids: list[int], hidden: np.ndarray | None) -> None:
        """Add a row for each token that the trunk has read; hidden [tokens d], None where it is not known."""
        self.tokens += ids if self.open else ids[1:]
        self.count += len(ids)
        if hidden is None:
            self.hidden = None
        else:
            before = hidden[:0] if self.hidden is None else self.hidden
            self.hidden = np.concatenate([before, hidden])
        if not self.whole:
            self.forget(self.count - WINDOW)

    def forget(self, rows: int) -> None:
        """Remove the first rows."""
        if rows > 0:
            self.count, self.tokens = self.count - rows, self.tokens[rows:]
            self.hidden = None if self.hidden is None else self.hidden[rows:]

    def fork(self) -> Waiting:
        """Return a copy."""
        generator = np.random.Generator(np.random.Philox(0))
        generator.bit_generator.state = self.generator.bit_generator.state
        return replace(self, tokens=list(self.tokens), generator=generator)


@dataclass(frozen=True)
class Call:
    """The latest call of `speculate`: what it fed, what came out, and the trunk's hidden states."""

    slots: list[int]
    rows: list[list[int]]
    runs: list[Run | InputError]
    mine: list[int]  # the numbers of this rank's sequences
    hidden: Sequence[np.ndarray] | np.ndarray | None  # b l d of these


class Drafter:
    """Drafts for a runner. Over ranks every rank makes the same calls; the last stage has the head.

    seconds: of all calls, by part: draft, verify, replay, sampling.
    """

    def __init__(self, runner: LocalRunner, slots: Slots):
        self.runner: LocalRunner = proxy(runner)  # no circle: a runner is freed with its last reference
        self.slots = slots  # the head's states
        self.begun: set[int] = set()  # slots that have any
        self.waiting: dict[int, Waiting] = {}
        self.call: Call | None = None
        self.dtype: Any = np.float32  # of hidden states
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.clock = time.perf_counter

    def join(self, slot: int, seed: int, whole: bool) -> None:
        """Begin with a sequence that may draft."""
        self.waiting[slot] = Waiting(whole, np.random.Generator(np.random.Philox([seed, 1])))

    def drop(self, slots: list[int]) -> None:
        """Forget sequences."""
        for slot in slots:
            self.waiting.pop(slot, None)
        self.begun -= set(slots)
        self.slots.drop(slots)

    def fork(self, slot: int, into: list[int], here: bool) -> None:
        """Copy what is known of a sequence; here: whether this rank has its states."""
        if slot in self.waiting:
            self.waiting |= {other: self.waiting[slot].fork() for other in into}
        if here and slot in self.begun:
            states = self.slots.gather([slot])
            self.slots.keep([slot, *into], state.take(states, [0] * (1 + len(into))))
            self.begun |= set(into)

    def follow(self, slots: list[int], rows: list[list[int]], mine: list[int], h, read: bool) -> None:
        """Note that the trunk has read rows of tokens; h: of this rank's, None after a step without them.

        read: whether the rows are of prompts, of which the head then reads what it reads of prompts.
        """
        if not any(slot in self.waiting for slot in slots):
            return
        if h is None:
            for slot, row in zip(slots, rows, strict=True):
                if slot in self.waiting:
                    self.waiting[slot].close(row[0])
            return
        self.note(slots, rows, mine, self.fetched(h))
        if read and any(slot in self.waiting and self.waiting[slot].whole for slot in slots):
            self.guess(slots, mine, [0] * len(slots), prompts=True)

    def fetched(self, h) -> np.ndarray | None:
        """Return hidden states on the host; None on a rank without the last layer."""
        if not self.runner.is_last:
            return None
        hidden = self.runner.model.backend.fetch(h)
        self.dtype = hidden.dtype
        return hidden

    def note(
        self,
        slots: list[int],
        rows: list[list[int]],
        mine: list[int],
        hidden: Sequence[np.ndarray] | np.ndarray | None,
    ) -> None:
        """Add rows that wait; hidden b l d of this rank's sequences."""
        here = {} if hidden is None else {slots[i]: hidden[at] for at, i in enumerate(mine)}
        for slot, row in zip(slots, rows, strict=True):
            if slot in self.waiting and row:
                found = here.get(slot)
                self.waiting[slot].add(row, None if found is None else found[: len(row)])

    def guess(
        self, slots: list[int], mine: list[int], counts: list[int], prompts: bool = False
    ) -> list[list[Guess]]:
        """Let the head read the rows that wait, and return counts[i] guesses for each sequence.

        Every sequence of the call has a row, for the ranks of ep exchange those of all; one that reads
        nothing has the length 0. prompts: only sequences whose prompts it reads whole. A rank that does not
        draw has the tokens of the guesses alone. A guess whose logits are not numbers is left out.
        """
        runner = self.runner
        reading = {}
        for slot in slots:
            waits = self.waiting.get(slot)
            reading[slot] = len(waits.tokens) if waits and (waits.whole or not prompts) else 0
        width = max(reading.values())
        if not width:
            return [[] for _ in slots]
        own = [slots[i] for i in mine] or [-1]
        h = np.zeros((len(own), width, runner.model.cfg.hidden_size), self.dtype)
        ids, lengths = np.zeros((len(own), width), np.int64), np.zeros(len(own), np.int64)
        for row, slot in enumerate(own):
            if n := reading.get(slot, 0):
                waits = self.waiting[slot]
                ids[row, :n], lengths[row] = waits.tokens[:n], n
                if waits.hidden is not None:
                    h[row, :n] = waits.hidden[:n]
        for slot, n in reading.items():
            if n:
                self.waiting[slot].forget(n)
        found: list[list[Guess]] = [[] for _ in slots]
        wanted = list(counts)

        def choose(logits) -> list[int]:
            tokens = self.chosen(slots, mine, logits, found, wanted)
            return [tokens[i] for i in mine] or [0]

        if runner.is_last:
            self.begin(own)
            here, states = runner.model.backend, self.slots.gather(own)
            full = None if (lengths == width).all() else lengths
            states = mtp.draft(runner.model, here.array(h), ids, states, max(counts), choose, full)
            self.slots.keep(own, states)
            self.slots.drop([-1])
        else:
            for _ in range(max(counts)):
                choose(None)
        return found

    def begin(self, slots: list[int]) -> None:
        """Give slots without any states of the head empty ones; -1, a row of padding, never has any."""
        if new := [slot for slot in slots if slot not in self.begun]:
            self.slots.keep(new, mtp.new_states(self.runner.model, len(new)))
            self.begun |= set(new) - {-1}

    def chosen(
        self, slots: list[int], mine: list[int], logits, found: list[list[Guess]], wanted: list[int]
    ) -> list[int]:
        """Return the next draft of every sequence, and add it to those found; 0 where none is wanted."""
        began, runner = self.clock(), self.runner
        own: dict[int, Guess] = {}
        if runner.draws:
            for row, i in zip(logits, mine, strict=False):
                if wanted[i] > len(found[i]) and (made := self.one(slots[i], row, found[i])):
                    own[i] = made
        tokens = runner.exchanged([own[i].token if i in own else -1 for i in mine], len(slots))
        for i, token in enumerate(tokens):
            if wanted[i] <= len(found[i]):
                continue
            if token < 0:
                wanted[i] = len(found[i])
                continue
            found[i].append(own.get(i) or Guess(token, *NOTHING))
            if i not in own and self.sampling(slots[i]).temperature != 0:
                self.waiting[slots[i]].generator.random()
        self.seconds["sampling"] += (took := self.clock() - began)
        self.seconds["draft"] -= took
        return [max(0, token) for token in tokens]

    def one(self, slot: int, logits: np.ndarray, before: list[Guess]) -> Guess | None:
        """Return the next draft of a sequence by logits [v]; None if they are not numbers."""
        seen = self.runner.drawings[slot].ids + [draft.token for draft in before]
        try:
            return guess(logits, self.sampling(slot), seen, self.waiting[slot].generator)
        except InputError:
            return None

    def sampling(self, slot: int) -> Sampling:
        """Return the sampling options of a sequence."""
        return self.runner.drawings[slot].sampling

    def speculate(self, slots: list[int], ids: list[int], counts: list[int]) -> list[Run | InputError]:
        """Feed one token to each of some sequences, and up to counts[i] drafts; see Runner."""
        began, runner = self.clock(), self.runner
        mine = runner.seat(slots, [])
        counts = [
            count if slot in self.waiting and self.waiting[slot].close(token) else 0
            for slot, token, count in zip(slots, ids, counts, strict=True)
        ]
        waited = [len(self.waiting[slot].tokens) if slot in self.waiting else 0 for slot in slots]
        guesses = self.guess(slots, mine, counts) if any(counts) else [[] for _ in slots]
        began = self.took("draft", began)
        rows = [[token, *(g.token for g in drafts)] for token, drafts in zip(ids, guesses, strict=True)]
        logits, hidden = runner.feed(slots, rows)
        began = self.took("verify", began)
        found: dict[int, tuple[list, int] | InputError] = {}
        if runner.draws:
            for row, i in zip(logits, mine, strict=False):
                found[i] = self.drawn(slots[i], row[: len(rows[i])], guesses[i])
        drawn = runner.shared(found, slots, max(map(len, rows)))
        runs = [
            made if isinstance(made, InputError) else Run(made, len(drafts), count * any(counts))
            for made, drafts, count in zip(drawn, guesses, waited, strict=True)
        ]
        self.call = Call(list(slots), rows, runs, mine, hidden)
        self.took("sampling", began)
        return runs

    def drawn(self, slot: int, logits: np.ndarray, guesses: list[Guess]) -> tuple[list, int] | InputError:
        """Return the draws of a sequence and how many random numbers they took, or the error of drawing."""
        try:
            return accepted(self.runner.drawings[slot], logits, guesses)
        except InputError as error:
            return error

    def keep(self, slots: list[int], counts: list[int]) -> None:
        """Keep the first counts[i] of the tokens that each sequence drew in the latest call."""
        began, runner, call = self.clock(), self.runner, self.call
        if call is None or call.slots != slots:
            raise ValueError(f"slots {slots} to keep: the call before this one was not of these")
        runner.replay(slots, runner.verified(slots, counts), counts)
        runner.recorded = None
        kept = [row[:count] for row, count in zip(call.rows, counts, strict=True)]
        for slot, run, count in zip(slots, call.runs, counts, strict=True):
            if isinstance(run, Run):
                runner.drawings[slot].ids.extend(draw.id for draw in run.draws[:count])
        self.note(slots, kept, call.mine, call.hidden)
        self.call = None
        self.took("replay", began)

    def took(self, part: str, began: float) -> float:
        """Add the seconds since `began` to a part, and return the time now."""
        now = self.clock()
        self.seconds[part] += now - began
        return now


NOTHING = np.array([], np.int64), np.array([])

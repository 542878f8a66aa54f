"""The loop: sequences join, are read, step side by side, and leave, each by its own options.

A turn is one call that reads (one chunk of a long prompt, or several short prompts) and one step of all that
have been read. The loop has no thread of its own: a caller that waits for an event makes turns until it has
one, so sequences of several callers share the calls of the model.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from refengine.generation import Draw, End, Options, PromptError, Text, Token
from refengine.machine import peak_memory
from refengine.progress import progress
from refengine.runner import PREFILL, How, Part, Runner, chunk_length
from refengine.spec.config import InputError
from refengine.speculation.acceptance import Run
from refengine.speculation.pace import Acceptance, Pace, Tally
from refengine.states.prefixes import Node, Prefixes
from refengine.states.state import Start, State
from refengine.text.tokenizer import Tokenizer

SLOTS = 32  # sequences side by side, at most
AT_ONCE = 8 * PREFILL  # positions of several prompts in one call while no sequence waits for its next step
CLOSED = "this engine is closed: load the model again"
PATIENCE = 3  # calls in a row that may pass over the prompt that has waited longest

Event = Token | End


@dataclass(eq=False)
class Sequence:
    """Holds one sequence, from the queue to its end. Its events go to `inbox` with its index."""

    index: int
    ids: list[int]
    options: Options
    text: Text
    inbox: deque
    slot: int = -1  # while it waits in the queue
    read: int = 0  # positions of the prompt
    latest: int = -1  # the token that was drawn last
    began: float = 0.0
    first: float = 0.0  # when the prompt had been read
    cancelled: bool = False
    acceptance: Acceptance = field(default_factory=Acceptance)  # of its drafts
    tally: Tally = field(default_factory=Tally)
    start: Start = field(default_factory=Start)
    reused: int = 0  # positions of the prompt that a state or a snapshot had read
    turn: int = 0  # the position after the last end token within the prompt
    node: Node | None = None  # the latest point of its prefix that was kept
    kept: State | None = None  # to be returned with its End
    end: End | None = None

    @property
    def left(self) -> int:
        """Return how many tokens of the prompt have not been read."""
        return len(self.ids) - self.read

    @property
    def drafts(self) -> int | str | None:
        """Return how many drafts a call may have: a number, "auto" or None."""
        return self.options.speculate

    @property
    def lengths(self) -> tuple[int, int]:
        """Return how many tokens have been read or drawn, and how many may be in all."""
        return self.read + self.text.drawn, len(self.ids) + self.text.drawn + self.rest

    @property
    def rest(self) -> int:
        """Return how many tokens may still be drawn."""
        return min(self.options.max_tokens, self.text.room) - self.text.drawn


@dataclass
class Loop:
    """Runs sequences over a runner, in at most `size` slots.

    trace: called after each turn with the indices of the sequences by slot, or None.
    prefixes: where sequences start, and the points of them that are kept; by default none.
    """

    runner: Runner
    tokenizer: Callable[[], Tokenizer]
    load_seconds: float = 0.0
    size: int = SLOTS
    trace: Callable[[dict[int, Sequence]], None] | None = None
    queue: deque[Sequence] = field(default_factory=deque)
    active: dict[int, Sequence] = field(default_factory=dict)  # by slot
    passed_over: int = 0
    bar: Any = None  # shows how far the prompts have been read
    pace: Pace = field(default_factory=Pace)  # of calls with drafts
    prefixes: Prefixes = None  # type: ignore[assignment]

    def __post_init__(self):
        self.prefixes = self.prefixes or Prefixes(self.runner)
        self.ready = threading.Condition()  # notified when a turn has ended
        self.turning = False  # whether a thread makes a turn

    def add(
        self, index: int, ids: list[int], options: Options, inbox: deque, start: Start | None = None
    ) -> Sequence:
        """Return a new sequence at the end of the queue."""
        if self.runner.closed:
            raise InputError(CLOSED)
        room = self.runner.config.max_position_embeddings - len(ids)
        text = Text(self.tokenizer(), options, room)
        new = Sequence(index, ids, options, text, inbox, start=start or Start())
        if new.start.state:
            text.follow(ids)
        new.acceptance.others = self.pace.acceptance
        self.queue.append(new)
        return new

    @contextlib.contextmanager
    def alone(self, unless: Callable[[], object] = lambda: False) -> Iterator[bool]:
        """Hold the turn in the block, and give True; or give False, without it, as soon as `unless()` holds.

        Waits for the turn that runs. Afterwards what was cancelled meanwhile is taken out, and all threads
        that wait look again.
        """
        with self.ready:
            self.ready.wait_for(lambda: not self.turning or unless())
            mine = not unless()
            self.turning |= mine
        try:
            yield mine
        finally:
            if mine:
                with self.ready:  # so that no `cancel` comes between the sweep and the end of the turn
                    try:
                        self.sweep()
                    finally:
                        self.turning = False
                        self.ready.notify_all()

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out: its slot is free at once, or when the turn that runs has ended."""
        sequence.cancelled = True
        with self.alone(unless=lambda: self.turning):
            pass  # the end of a turn takes it out

    def sweep(self) -> None:
        """Take out what was cancelled."""
        for sequence in [sequence for sequence in list(self.queue) if sequence.cancelled]:
            self.queue.remove(sequence)
        self.free([sequence for sequence in self.active.values() if sequence.cancelled])

    def free(self, sequences: list[Sequence]) -> None:
        """Free the slots of sequences."""
        for sequence in sequences:
            self.active.pop(sequence.slot, None)
        if sequences:
            self.hide()
            self.runner.drop([sequence.slot for sequence in sequences])

    def wait(self, inbox: deque, running: Collection) -> None:
        """Make turns until the inbox holds an event or nothing is `running`; other threads may make them."""
        mine = True
        while mine:
            with self.alone(unless=lambda: inbox or not running) as mine:
                if mine:
                    self.turn()

    def turn(self) -> None:
        """Admit sequences that wait, read once, and step once all that have been read."""
        try:
            self.admit()
            if parts := self.to_read():
                sequences = [self.active[part.slot] for part in parts]
                for sequence, part in zip(sequences, parts, strict=True):
                    sequence.read += len(part.ids)
                draws = self.runner.read(parts)
                self.show(sum(len(part.ids) for part in parts))
                self.prefixes.after_read(sequences, chunk_length(self.runner.config))
                self.deliver(sequences, draws)
            ready = [sequence for sequence in self.active.values() if not sequence.left]
            if ready:
                self.step(ready)
        except BaseException as failed:
            self.fail(failed)
            raise
        if self.trace:
            self.trace(dict(self.active))

    def step(self, ready: list[Sequence]) -> None:
        """Step sequences once, or let them draw several tokens of drafts."""
        slots, ids = [s.slot for s in ready], [s.latest for s in ready]
        if not any(s.drafts for s in ready):
            self.deliver(ready, self.runner.step(slots, ids))
            return
        counts = self.pace.counts(ready)
        if not any(counts):
            self.deliver(ready, self.pace.step(self.runner, slots, ids))
            return
        runs, took = self.pace.speculate(self.runner, slots, ids, counts)
        ended, taken = self.taken(ready, runs)
        self.pace.keep(self.runner, slots, runs, taken, took)
        self.finish(ended)

    def show(self, read: int) -> None:
        """Move the bar on by tokens that were read."""
        left = sum(sequence.left for sequence in self.active.values())
        self.bar = self.bar or progress("prompt", read + left, "token")
        self.bar.total = self.bar.n + read + left  # others may have joined or left
        self.bar.update(read)
        self.hide()

    def hide(self) -> None:
        """Close the bar if no prompt in a slot has any token left."""
        if self.bar and not any(sequence.left for sequence in self.active.values()):
            self.bar = self.bar.close()

    def fail(self, error: BaseException) -> None:
        """End every sequence that has a slot with an error: what its layers remember is not known."""
        lost = list(self.active.values())
        known = isinstance(error, InputError)
        why = error if known else InputError(f"generation was interrupted by {type(error).__name__}")
        for sequence in lost:
            sequence.inbox.append((sequence.index, why))
        self.free(lost)

    def close(self, error: InputError) -> None:
        """End every sequence, those that wait too, with an error, and close the runner."""
        with self.alone():
            while self.queue:
                sequence = self.queue.popleft()
                sequence.inbox.append((sequence.index, error))
            self.fail(error)
            self.runner.close()

    def admit(self) -> None:
        """Give free slots to the sequences that have waited longest, as far as the memory allows.

        What the sequences in slots have yet to take counts, for they take it as they are read and drawn.
        """
        while self.queue and len(self.active) < self.size:
            sequence = self.queue[0]
            together = [sequence, *self.active.values()]
            if self.active and not self.runner.fits([each.lengths for each in together]):
                return
            self.queue.popleft()
            if not self.active and (refused := self.runner.refusal(sequence.lengths[1])):
                sequence.inbox.append((sequence.index, refused))
                continue
            sequence.slot = next(slot for slot in range(self.size) if slot not in self.active)
            sequence.began = time.perf_counter()
            self.active[sequence.slot] = sequence
            self.prefixes.begin(sequence, self.how(sequence))

    def to_read(self) -> list[Part]:
        """Return what the next call reads: short prompts side by side, or one chunk of a long one.

        The prompt with the fewest tokens left comes first; the one that has waited longest is passed over
        PATIENCE times in a row at most.
        """
        waiting = [sequence for sequence in self.active.values() if sequence.left]
        if not waiting:
            return []
        oldest, chunk = min(waiting, key=lambda s: s.began), chunk_length(self.runner.config)
        by_length = sorted(waiting, key=lambda s: (s.left, s.began))
        if self.passed_over >= PATIENCE:
            by_length = [oldest]
        first, *others = by_length
        chosen = [first]
        if first.read == first.reused and first.left <= chunk:
            budget = chunk if len(waiting) < len(self.active) else AT_ONCE
            for other in others:
                if other.read > other.reused or other.left > chunk or (len(chosen) + 1) * other.left > budget:
                    break
                chosen.append(other)
        self.passed_over = 0 if oldest in chosen else self.passed_over + 1
        return [self.part(sequence, chunk) for sequence in chosen]

    def part(self, sequence: Sequence, chunk: int) -> Part:
        """Return the next part of a prompt."""
        stop = self.prefixes.stop(sequence, chunk)
        how = None if sequence.read else self.how(sequence)
        last = stop == len(sequence.ids) and not sequence.text.full
        return Part(sequence.slot, sequence.ids[sequence.read : stop], how, last)

    def how(self, sequence: Sequence) -> How:
        """Return how a sequence draws."""
        options, state = sequence.options, sequence.start.state
        likeliest = options.logprobs and min(options.logprobs, self.runner.config.vocab_size)
        drafts = bool(options.speculate)
        whole = options.speculate != "auto"
        generator = state.generator if state and sequence.start.resumed else None
        return How(options.sampling, options.seed or 0, likeliest, drafts, whole, generator)

    def deliver(self, sequences: list[Sequence], draws: Iterable[Run | Draw | InputError | None]) -> None:
        """Turn draws into events, and free the slots of the sequences that end."""
        self.finish(self.taken(sequences, draws)[0])

    def taken(
        self, sequences: list[Sequence], draws: Iterable[Run | Draw | InputError | None]
    ) -> tuple[list[Sequence], list[int]]:
        """Turn draws into events; return the sequences that end, and how many draws of each were used.

        Of a run, the draws after the end of its sequence are not used.
        """
        ended, counts = [], []
        for sequence, drawn in zip(sequences, draws, strict=True):
            if isinstance(drawn, Exception):
                sequence.inbox.append((sequence.index, drawn))
                ended.append(sequence)
                counts.append(0)
                continue
            if isinstance(drawn, Run):
                sequence.tally.note(drawn)
                sequence.acceptance.note(drawn)
            run = drawn.draws if isinstance(drawn, Run) else [drawn]
            used = 0
            while used < len(run) and not sequence.text.ended:
                self.event(sequence, run[used])
                used += 1
            counts.append(used)
            if sequence.text.ended:
                ended.append(sequence)
        return ended, counts

    def event(self, sequence: Sequence, draw: Draw | None) -> None:
        """Turn a draw into events."""
        if sequence.left:
            return
        text = sequence.text
        if not sequence.first:
            sequence.first = time.perf_counter()
        tokens, reason = text.take(draw) if draw else ([], text.full)
        for token in tokens:
            sequence.latest = token.id
            sequence.inbox.append((sequence.index, token))
        if reason:
            sequence.end = End(reason, text.rest(), self.statistics(sequence))

    def finish(self, sequences: list[Sequence]) -> None:
        """Turn the Ends of sequences into events, with their states if asked for, and free their slots."""
        for sequence in sequences:
            if sequence.end:
                self.prefixes.at_end(sequence)
                sequence.inbox.append((sequence.index, replace(sequence.end, state=sequence.kept)))
        self.free(sequences)

    def statistics(self, sequence: Sequence) -> dict:
        """Return counts, seconds, tokens per second, bytes of a sequence that ends now."""
        prefill, decode = sequence.first - sequence.began, time.perf_counter() - sequence.first
        steps = max(0, sequence.text.drawn - 1)  # the first token comes out of the prompt
        return {
            "prompt_tokens": len(sequence.ids),
            "reused_tokens": sequence.reused,
            "new_tokens": sequence.text.drawn,
            "seed": sequence.options.seed,
            "load_seconds": self.load_seconds,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "prefill_tokens_per_second": (len(sequence.ids) - sequence.reused) / prefill,
            "decode_tokens_per_second": steps / decode if steps else None,
            "peak_memory_bytes": peak_memory(),
        } | ({"speculation": sequence.tally.statistics()} if sequence.drafts else {})


class Batch(Iterator[tuple[int, Event]]):
    """Yields the events of several sequences, (index, event), in order within each sequence.

    Requests, (token ids, Options) or with a Start, are taken from their iterator as slots fall free. An error
    of one sequence is raised in place of its next event, that of a request when the sequences before it have
    ended; `next` then continues with the others. `close` cancels all, `cancel` one of them.
    """

    def __init__(self, loop: Loop, requests: Iterator[tuple | PromptError]):
        self.loop, self.requests = loop, enumerate(requests)
        self.inbox: deque[tuple[int, Event | Exception]] = deque()
        self.open: dict[int, Sequence] = {}
        self.cancelled: set[int] = set()  # indices of requests that were not taken yet
        self.refused: deque[PromptError] = deque()  # wait for the sequences before them

    def __next__(self) -> tuple[int, Event]:
        while True:
            self.refill()
            if self.refused and all(index > self.refused[0].index for index in self.open):
                raise self.refused.popleft()
            if not self.inbox and not self.open:
                raise StopIteration
            if not self.inbox:
                self.loop.wait(self.inbox, self.open)
            try:
                index, event = self.inbox.popleft()
            except IndexError:  # all were cancelled by another thread, or it took the event
                continue
            if index not in self.open:  # cancelled
                continue
            if not isinstance(event, Token):
                del self.open[index]
            if isinstance(event, Exception):
                raise event
            return index, event

    def refill(self) -> None:
        """Queue as many requests as there are slots."""
        while len(self.open) + len(self.refused) < self.loop.size:
            try:
                index, request = next(self.requests)
            except StopIteration:
                return
            if index in self.cancelled:
                continue
            if isinstance(request, PromptError):
                self.refused.append(request)
            else:
                ids, options, *start = request
                self.open[index] = self.loop.add(index, ids, options, self.inbox, *start)

    def cancel(self, index: int) -> None:
        """Take the sequence `index` out; it has no more events, not even an End."""
        sequence = self.open.pop(index, None)
        if sequence is None:
            self.cancelled.add(index)
            self.refused = deque(error for error in self.refused if error.index != index)
        else:
            self.loop.cancel(sequence)

    def close(self) -> None:
        """Take all sequences out."""
        self.requests = enumerate(())
        self.refused.clear()
        for index in list(self.open):
            self.cancel(index)

    def __del__(self):
        self.close()

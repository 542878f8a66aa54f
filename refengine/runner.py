"""The runner: the interface between the engine and a placed model, for sequences that join and leave.

A sequence has a slot, a number that the caller chooses. Its prompt is read in one call or several, then it
steps, alone or beside any others, and its slot is dropped when it ends. `LocalRunner` is the form in one
process; refengine/ranks/runner.py is the form over several. The loop and the engine use only `Runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from refengine.generation import Draw, Drawing, draw_greedily
from refengine.machine import available_memory, peak_memory
from refengine.progress import progress
from refengine.spec import mtp, state
from refengine.spec.config import Config, InputError
from refengine.spec.model import Model
from refengine.spec.ops import Backend
from refengine.spec.sample import Sampling, checked, log_probs
from refengine.speculation.acceptance import Run
from refengine.speculation.drafting import Drafter
from refengine.states.arrays import Arrays, of_row, to_states
from refengine.states.shelf import Shelf
from refengine.states.state import set_generator
from refengine.storage import Sizes, sizes

PREFILL = 512  # positions of a sequence in one call, at most; cut at whole chunks of the model


@dataclass(frozen=True)
class How:
    """Sampling options of a sequence, sent with the first part of its prompt to the rank that draws.

    generator: a state of NumPy's Philox to go on from; None: that of the seed.
    """

    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    logprobs: int | None = None
    drafts: bool = False  # whether the prediction head may draft
    whole: bool = True  # whether it then reads the whole prompt, or the last of it when it first drafts
    generator: dict | None = None

    def drawing(self) -> Drawing:
        """Return a drawing by these options, of a sequence without tokens."""
        drawing = Drawing(self.sampling, self.seed, self.logprobs)
        if self.generator is not None:
            set_generator(drawing.generator, self.generator)
        return drawing


@dataclass(frozen=True)
class Part:
    """A part of a prompt, to be read into a slot.

    how: given with the first part of a prompt, None with later ones. last: whether the prompt ends here, so
    that a token is drawn.
    """

    slot: int
    ids: list[int]
    how: How | None
    last: bool


@dataclass(frozen=True)
class Scores:
    """Log-probabilities: trunk[i] of token i + 1, and head[i], by the prediction head, of token i + 2."""

    ids: list[int]
    trunk: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)


class Runner(Protocol):
    """A model that reads prompts and steps, by slots.

    A list of draws has one entry for each sequence of the call, in its order: a Draw, the InputError of a
    sequence whose logits cannot be drawn from, or None where nothing was to be drawn.
    """

    model: Model
    closed: bool
    drawings: dict[int, Drawing]

    @property
    def config(self) -> Config:
        """Return the configuration; over ranks, that of this rank's part."""
        ...

    def read(self, parts: list[Part]) -> list[Draw | InputError | None]:
        """Read parts of prompts side by side; return a draw for each prompt that ends here, else None."""
        ...

    def step(self, slots: list[int], ids: list[int], draw: bool = True) -> list[Draw | InputError | None]:
        """Feed one token to each of some slots; return what each draws next, or with draw = False nothing."""
        ...

    def verify(self, slots: list[int], ids: list[list[int]]) -> list[np.ndarray]:
        """Feed several tokens to each of some slots, which stay where they were; return logits [tokens v]."""
        ...

    def commit(self, slots: list[int], counts: list[int]) -> None:
        """Keep the first counts[i] of the tokens that `verify`, the call before, fed to slots[i]."""
        ...

    def speculate(self, slots: list[int], ids: list[int], counts: list[int]) -> list[Run | InputError]:
        """Feed one token to each of some slots, and up to counts[i] drafts of it; return what each draws.

        A run has one token more than drafts were accepted. The slots stay where they were until `keep`.
        """
        ...

    def keep(self, slots: list[int], counts: list[int]) -> None:
        """Keep the first counts[i] of the tokens that `speculate`, the call before, drew for slots[i].

        Then slots[i] has read the token that was fed and the first counts[i] - 1 of those drawn.
        """
        ...

    def fork(self, slot: int, into: list[int]) -> None:
        """Copy the sequence of a slot, and how it draws, into other slots, which are free."""
        ...

    def drop(self, slots: list[int]) -> None:
        """Free the slots of sequences that have ended."""
        ...

    def snapshot(self, slot: int, name: int, start: int = 0) -> tuple[int, int]:
        """Keep copies of a slot's states under `name`, keys and values from position `start` on.

        Returns the bytes of keys and values, and of the rest: of the rank that has most.
        """
        ...

    def restore(self, slot: int, names: list[int], ids: list[int], how: How) -> None:
        """Put a sequence that has read `ids` into a free slot, from the snapshots under these names."""
        ...

    def forget(self, names: list[int], points: list[int]) -> None:
        """Forget snapshots, and of those named in `points` all but keys and values."""
        ...

    def collect(self, name: int) -> Arrays:
        """Return a snapshot of the whole model, on rank 0."""
        ...

    def spread(self, name: int, arrays: Arrays) -> None:
        """Keep the arrays of the whole model under a name; rank 0 has them, the others get their part."""
        ...

    def fits(self, lengths: list[tuple[int, int]]) -> bool:
        """Return whether the memory has room for sequences that have so many tokens and may have so many."""
        ...

    def refusal(self, tokens: int) -> InputError | None:
        """Return the error for a sequence of so many tokens that the free memory cannot hold, or None."""
        ...

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return teacher-forced logits [tokens v]."""
        ...

    def score(self, ids: list[int]) -> Scores:
        """Return how likely each token is, given those before it."""
        ...

    def fill(self, slots: list[int], context: int) -> None:
        """Put noise into slots as if each had read `context` tokens; for measurements."""
        ...

    def peak_memory(self) -> int:
        """Return the most bytes that this process, or the rank that took most, has held."""
        ...

    def follow(self) -> None:
        """Make the calls of rank 0, on any other rank, until rank 0 closes its runner."""
        ...

    def close(self) -> None:
        """Free the states and the weights; over ranks, let the others end."""
        ...


def chunk_length(cfg: Config) -> int:
    """Return the most positions of one sequence in a call: at most PREFILL, in whole chunks of the model."""
    chunk = max(1, cfg.chunk_size)
    return PREFILL if chunk > PREFILL else PREFILL // chunk * chunk


@dataclass
class Slots:
    """The states of sequences by slot, in batches: those that step together stay together."""

    # slots of the rows, None for one that was dropped; states of layers
    batches: list[tuple[list[int | None], list]] = field(default_factory=list)

    @property
    def held(self) -> list[int]:
        """Return the slots that have states, in order of their numbers."""
        return sorted(slot for rows, _ in self.batches for slot in rows if slot is not None)

    def keep(self, slots: list[int], states: list) -> None:
        """Store the states of a batch whose rows belong to these slots."""
        if slots:
            self.batches.append((list(slots), states))

    def gather(self, slots: list[int]) -> list:
        """Return the states of these slots as one batch in this order; they are no longer stored here.

        A batch of just these slots is not copied; of any others each row is copied once.
        """
        where = {slot: (n, row) for n, (rows, _) in enumerate(self.batches) for row, slot in enumerate(rows)}
        found = [where[slot] for slot in slots]
        first, states = self.batches[found[0][0]]
        if first != slots:
            states = state.join([states for _, states in self.batches], found)
        self.drop(slots)
        return states

    def at(self, slot: int) -> tuple[list, int]:
        """Return the states of the batch that has a slot, and the slot's row in it."""
        return next((states, rows.index(slot)) for rows, states in self.batches if slot in rows)

    def drop(self, slots: list[int]) -> None:
        """Free these slots; the memory of a row is free once its batch has no other, or is gathered."""
        self.batches = [batch for rows, states in self.batches for batch in without(rows, states, slots)]


def without(rows: list[int | None], states: list, slots: list[int]) -> list[tuple[list[int | None], list]]:
    """Return the batch in which these slots have no row, as a list: empty if no row is left."""
    left = [None if slot in slots else slot for slot in rows]
    return [(left, states)] if any(slot is not None for slot in left) else []


class LocalRunner:
    """A Runner in this process, over a model that is whole."""

    silent = False  # whether progress bars are left out
    first_layer = 0  # of those whose states are here

    def __init__(self, model: Model):
        self.model = model
        self.closed = False
        self.slots = Slots()
        self.drafter = Drafter(self, Slots())
        self.latest: Any = None  # hidden states of the latest call; None after a step without verbs
        self.drawings: dict[int, Drawing] = {}
        self.recorded: tuple[list[int], list[int], Any] | None = None  # slots, tokens of each, `replayed`
        self.shelf = Shelf()

    @property
    def config(self) -> Config:
        """Return the configuration of the model."""
        return self.model.cfg

    @property
    def is_last(self) -> bool:
        """Return whether the last layer is here."""
        return True

    @property
    def draws(self) -> bool:
        """Return whether tokens of the latest call are drawn here."""
        return True

    def read(self, parts: list[Part]) -> list[Draw | InputError | None]:
        """Read parts of prompts side by side; return a draw for each prompt that ends here, else None."""
        fresh = [part.slot for part in parts if part.how]
        for part in parts:
            if part.how:
                self.drawings[part.slot] = part.how.drawing()
                if part.how.drafts:
                    self.drafter.join(part.slot, part.how.seed, part.how.whole)
            self.drawings[part.slot].ids.extend(part.ids)
        slots, rows = [part.slot for part in parts], [part.ids for part in parts]
        return self.call(slots, rows, fresh, [part.last for part in parts], True)

    def step(self, slots: list[int], ids: list[int], draw: bool = True) -> list[Draw | InputError | None]:
        """Feed one token to each of some sequences; return what each draws next.

        draw = False: return when the logits have been computed, and draw nothing.
        """
        return self.call(slots, [[token] for token in ids], [], [draw] * len(slots))

    def drop(self, slots: list[int]) -> None:
        """Free these slots; unknown ones are left out."""
        for slot in slots:
            self.drawings.pop(slot, None)
        self.drafter.drop(slots)
        self.slots.drop(slots)
        if self.recorded and set(slots) & set(self.recorded[0]):
            self.recorded = None

    def verify(self, slots: list[int], ids: list[list[int]]) -> list[np.ndarray]:
        """Feed several tokens to each of some sequences; return the logits [tokens v] of each sequence.

        The sequences stay where they were, and nothing is drawn. `commit` keeps some of the tokens, before
        the next call that reads or steps.
        """
        logits, _ = self.feed(slots, ids)
        return [found[: len(row)] for found, row in zip(logits, ids, strict=True)]

    def feed(self, slots: list[int], rows: list[list[int]]) -> tuple[Any, Any]:
        """Return logits [b width v] and hidden states [b width d] of rows of tokens, on the host.

        The states stay until `commit`. A row may have more positions than tokens.
        """
        if verify := self.model.backend.verify:
            states = self.slots.gather(slots)
            self.slots.keep(slots, states)
            if found := verify(self.model, rows, states):
                *found, replayed = found
                self.recorded = list(slots), [len(row) for row in rows], replayed
                return tuple(found)
        h, records = self.record(slots, rows, [], max(map(len, rows)))
        self.recorded = list(slots), [len(row) for row in rows], self.replayed(records)
        return self.head(h), self.drafter.fetched(h)

    def record(self, slots: list[int], rows: list[list[int]], fresh: list[int], width: int) -> tuple:
        """Return hidden states [b width d] of rows of tokens, and records; the states stay as they were."""
        if fresh:
            self.slots.keep(fresh, self.begun(fresh))
        ids, lengths = side_by_side(rows, width)
        states = self.slots.gather(slots)
        self.slots.keep(slots, states)
        return self.blocks(ids, states, lengths, record=True)

    def commit(self, slots: list[int], counts: list[int]) -> None:
        """Keep the first counts[i] of the tokens that `verify` fed to slots[i]: all slots of that call."""
        self.replay(slots, self.verified(slots, counts), counts)
        self.recorded = None

    def verified(self, slots: list[int], counts: list[int]) -> Any:
        """Return `replayed` of the latest `verify`; ValueError if it was of other slots or fewer tokens."""
        recorded, most, replayed = self.recorded or ([], [], None)
        if slots != recorded:
            raise ValueError(f"slots {slots} to commit: the call before this one verified {recorded}")
        if not all(0 <= count <= fed for count, fed in zip(counts, most, strict=True)):
            raise ValueError(f"{counts} tokens to commit, of {most} that were verified")
        return replayed

    def replayed(self, records: list, *layers: int) -> Callable[[list, list[int]], list]:
        """Return the function (states, counts) -> states after the first counts[i] tokens of the records."""
        return lambda states, counts: self.model.commit(states, records, counts, *layers)

    def replay(self, slots: list[int], replayed: Any, counts: list[int]) -> None:
        """Store the states of slots after the first counts[i] tokens of a recorded call."""
        self.slots.keep(slots, replayed(self.slots.gather(slots), counts))

    def speculate(self, slots: list[int], ids: list[int], counts: list[int]) -> list[Run | InputError]:
        """Feed one token to each of some sequences, and up to counts[i] drafts of it; see Runner."""
        return self.drafter.speculate(slots, ids, counts)

    def keep(self, slots: list[int], counts: list[int]) -> None:
        """Keep the first of the tokens that `speculate` drew; see Runner."""
        self.drafter.keep(slots, counts)

    def fork(self, slot: int, into: list[int]) -> None:
        """Copy the sequence of a slot, and how it draws, into other slots, which are free."""
        self.forkable(slot, into)
        self.copy(slot, into)
        self.drafter.fork(slot, into, self.has(slot))
        self.drawings |= {other: self.drawings[slot].fork() for other in into}

    def forkable(self, slot: int, into: list[int]) -> None:
        """Raise ValueError unless a slot has a sequence, and those it is to be copied into have none."""
        if slot not in self.drawings or len({slot, *into}) <= len(into) or set(into) & set(self.drawings):
            raise ValueError(f"slot {slot} to fork into {into}: it must be in use, and these free")

    def copy(self, slot: int, into: list[int]) -> None:
        """Store copies of the states of a slot in others."""
        states = self.slots.gather([slot])
        self.slots.keep([slot, *into], state.take(states, [0] * (1 + len(into))))

    def snapshot(self, slot: int, name: int, start: int = 0) -> tuple[int, int]:
        """Keep copies of a slot's states under `name`; see Runner."""
        return self.shelf.put(name, self.remembered(slot, start))

    def remembered(self, slot: int, start: int) -> Arrays:
        """Return copies of a slot's states, keys and values from position `start` on."""
        states, row = self.slots.at(slot)
        return of_row(states, row, self.model.backend, self.first_layer, start)

    def restore(self, slot: int, names: list[int], ids: list[int], how: How) -> None:
        """Put a sequence that has read `ids` into a free slot, from the snapshots under these names."""
        self.drawings[slot] = how.drawing()
        self.drawings[slot].ids.extend(ids)
        kept, here = self.shelf.chain(names), self.model.backend
        self.slots.keep([slot], to_states(self.begun([slot]), kept, here, self.first_layer, len(ids)))
        if how.drafts:
            self.drafter.join(slot, how.seed, how.whole)

    def forget(self, names: list[int], points: list[int]) -> None:
        """Forget snapshots, and of those named in `points` all but keys and values."""
        self.shelf.forget(names, points)

    def collect(self, name: int) -> Arrays:
        """Return a snapshot."""
        return self.shelf.kept[name]

    def spread(self, name: int, arrays: Arrays) -> None:
        """Keep arrays under a name."""
        self.shelf.put(name, arrays)

    def fits(self, lengths: list[tuple[int, int]]) -> bool:
        """Return whether half of the free memory holds what sequences have yet to take.

        lengths: the tokens of each sequence, now and at most.
        """
        return not self.sizes or self.sizes.growth(lengths) <= available_memory() // 2

    def refusal(self, tokens: int) -> InputError | None:
        """Return the error for a sequence of so many tokens that the free memory cannot hold, or None."""
        return self.sizes.refusal(tokens, available_memory()) if self.sizes else None

    @cached_property
    def sizes(self) -> Sizes | None:
        """Return the bytes of the states of one sequence; None where they are not on the host."""
        return sizes(self.new_states(1), self.config)

    def has(self, slot: int) -> bool:
        """Return whether the states of a slot are here."""
        return True

    def seat(self, slots: list[int], fresh: list[int]) -> list[int]:
        """Return the numbers of the sequences of a call that are computed here."""
        return list(range(len(slots)))

    def exchanged(self, tokens: list[int], count: int) -> list[int]:
        """Return the tokens that were chosen for all `count` sequences of a call, of those chosen here."""
        return tokens

    def shared(self, found: dict[int, tuple[list[Draw], int] | InputError], slots: list[int], most: int):
        """Return what all sequences of a call drew, `most` tokens at most, of what was drawn here by number.

        Beside the draws stands how many random numbers they took.
        """
        made = (found[i] for i in range(len(slots)))
        return [each if isinstance(each, InputError) else each[0] for each in made]

    def call(
        self,
        slots: list[int],
        rows: list[list[int]],
        fresh: list[int],
        wanted: list[bool],
        prompts: bool = False,
    ) -> list[Draw | InputError | None]:
        """Feed rows of tokens to slots, of which `fresh` have read nothing; draw where it is `wanted`."""
        width = max(map(len, rows))
        logits = self.forward(
            slots, rows, fresh, any(wanted) or width == 1, width, self.drafts(slots, prompts)
        )
        self.drafter.follow(slots, rows, self.seat(slots, fresh), self.latest, prompts)
        if all(wanted) and (draws := draw_greedily([self.drawings[slot] for slot in slots], logits)):
            return list(draws)
        return [
            self.drawn(slot, logits[i]) if want else None
            for i, (slot, want) in enumerate(zip(slots, wanted, strict=True))
        ]

    def drafts(self, slots: list[int], prompts: bool) -> bool:
        """Return whether hidden states of a call are needed: of prompts, if one may have drafts."""
        return prompts and any(slot in self.drafter.waiting for slot in slots)

    def drawn(self, slot: int, logits: np.ndarray) -> Draw | InputError:
        """Return what the sequence of a slot draws from logits [v], or the error of drawing."""
        return self.drawings[slot].attempt(logits)

    def forward(
        self,
        slots: list[int],
        rows: list[list[int]],
        fresh: list[int],
        logits: bool,
        width: int,
        hidden: bool = False,
    ) -> np.ndarray:
        """Return logits [b v] after the last token of each row, or [] if they are not wanted.

        The rows are padded to `width`; the states are stored by their slots. `self.latest` is then the hidden
        states [b width d], or None after a step of one call if `hidden` are not needed.
        """
        self.recorded = self.latest = None
        if fresh:
            self.slots.keep(fresh, self.begun(fresh))
        states, here = self.slots.gather(slots), self.model.backend
        if here.step and width == 1 and not hidden:
            result, states = here.step(self.model, [row[0] for row in rows], states)
        else:
            ids, lengths = side_by_side(rows, width)
            h, states = self.blocks(ids, states, lengths)
            last = np.array([len(row) - 1 for row in rows])
            result = self.head(h, last) if logits else np.empty((0, 0))
            self.latest = h
        self.slots.keep(slots, states)
        return result

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return teacher-forced logits [tokens v], float32 or wider; row i is for the token after i."""
        return np.concatenate([self.head(h)[0] for _, h in self.hidden(ids)])

    def score(self, ids: list[int]) -> Scores:
        """Return how likely each token is, given those before it, by the trunk and by the prediction head."""
        scores = Scores(ids)
        head = mtp.new_states(self.model, 1)
        for start, h in self.hidden(ids):
            following = ids[start + 1 : start + 1 + h.shape[1]]
            scores.trunk.extend(_chosen(self.head(h)[0], following))
            if self.config.mtp_layers and following:
                after = self.model.backend.array(np.array([following]))
                o, head = mtp.predict(self.model, h[:, : len(following)], after, head)
                scores.head.extend(_chosen(self.head(o)[0], ids[start + 2 : start + 2 + len(following)]))
        return scores

    def hidden(self, ids: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Read one sequence from its beginning: (start, h [1 l d]) of each call."""
        states, step = self.new_states(1), chunk_length(self.config)
        with progress("text", len(ids), "token", self.silent) as bar:
            for start in range(0, len(ids), step):
                h, states = self.blocks(np.array([ids[start : start + step]]), states)
                yield start, h
                bar.update(h.shape[1])

    def fill(self, slots: list[int], context: int) -> None:
        """Put noise into these slots as if each had read `context` tokens; for measurements."""
        self.drawings |= {slot: Drawing(Sampling(temperature=0), 0) for slot in slots}
        self.slots.keep(slots, self.filled(len(slots), context, self.model.backend))

    def filled(self, batch: int, context: int, here: Backend) -> list:
        """Return states of sequences that have read one token and `context` - 1 positions of noise."""
        h, states = self.blocks(np.zeros((batch, 1), np.int64), self.new_states(batch))
        dtype, cfg = here.fetch(h).dtype, self.model.cfg
        rng, known = np.random.default_rng(0), 1
        while known < context:
            more = min(4096, context - known)
            shape = batch, more, cfg.num_key_value_heads, cfg.head_dim
            noise = rng.standard_normal(shape, np.float32).astype(dtype)
            states = [
                s.append(here.array(noise), here.array(noise)) if hasattr(s, "append") else s for s in states
            ]
            known += more
        return states

    def peak_memory(self) -> int:
        """Return the most bytes that this process has held."""
        return peak_memory()

    def new_states(self, batch: int) -> list:
        """Return the states of sequences that have read nothing."""
        return self.model.new_states(batch)

    def begun(self, slots: list[int]) -> list:
        """Return the states of the sequences of these slots, which have read nothing."""
        seeds = [self.drawings[slot].seed if slot in self.drawings else 0 for slot in slots]
        return state.keyed(self.new_states(len(slots)), seeds, self.first_layer)

    def blocks(
        self, ids: np.ndarray, states: list, lengths: np.ndarray | None = None, record: bool = False
    ) -> tuple[Any, list]:
        """Run all layers: ids [b l], of which lengths [b] are real -> h [b l d], next states or records."""
        here = self.model.backend
        x = self.model.embed(here.array(ids))
        given = None if lengths is None else here.array(lengths)
        return self.model.blocks(x, states, given, record=record)

    def head(self, h, positions: np.ndarray | None = None) -> np.ndarray:
        """Return logits on the host: [b l v], or with positions [b] of one of each sequence: [b v]."""
        return self.model.backend.fetch(self.model.head(h, positions))

    def follow(self) -> None:
        """Return at once: in one process there is no rank 0 to follow."""

    def close(self) -> None:
        """Free the states and the weights."""
        self.closed = True
        self.slots, self.drawings, self.recorded, self.shelf = Slots(), {}, None, Shelf()
        self.drafter, self.latest = Drafter(self, Slots()), None
        step = self.model.backend.step
        if step and hasattr(step, "close"):  # it keeps the weights of its latest calls
            step.close()
        self.model = replace(self.model, weights={})


def _chosen(logits: np.ndarray, ids: list[int]) -> list[float]:
    """Return the log-probability of each id, by the row of logits that came before it."""
    if not ids:
        return []
    rows = log_probs(checked(logits[: len(ids)]))
    return [float(row[token]) for row, token in zip(rows, ids, strict=True)]


def side_by_side(rows: list[list[int]], width: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return rows as ids [b width], padded with zeros, and their lengths [b], None if all are full."""
    lengths = np.array([len(row) for row in rows])
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    return ids, None if (lengths == width).all() else lengths

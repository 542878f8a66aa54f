"""The runner over ranks: each has a part of the model, and all make the same calls.

Rank 0 has the loop and the engine. Every call of its runner is broadcast; the other ranks `follow`: they make
the same call with their part of the model. Tokens are drawn where the logits are, on the first rank of tp on
the last stage, and the draws are shared. Several sequences are divided among the ranks of ep, or go to all.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from refengine.generation import Draw, Drawing
from refengine.machine import peak_memory
from refengine.ranks.comm import RankError, Ranks
from refengine.ranks.seats import Seats
from refengine.runner import How, LocalRunner, Part, Scores
from refengine.spec import ranks
from refengine.spec.config import Config, InputError
from refengine.spec.model import Model
from refengine.spec.ops import Backend
from refengine.spec.sample import Sampling
from refengine.spec.shard import Shard
from refengine.states.arrays import Arrays, cut, whole_of
from refengine.states.file import packed, unpacked


class RankRunner(LocalRunner):
    """A Runner as one of several ranks.

    whole: the configuration of the whole model; model.cfg is that of this rank's part.
    plain: the backend before its operations knew of other ranks.
    """

    def __init__(self, model: Model, whole: Config, comm: Ranks, shard: Shard, plain: Backend):
        super().__init__(model)
        self.whole, self.comm, self.shard, self.plain = whole, comm, shard, plain
        self.silent = comm.rank > 0
        self.first_layer = shard.layers(whole)[0]
        self.spreading: Arrays = {}  # on rank 0, while they are sent
        self.homes: dict[int, int | None] = {}  # the rank of ep that has a slot's states; None: all of them
        self.seats = Seats(((),))
        self.mine: list[int] = []  # numbers of the sequences of the latest call that this rank has
        self.dropped: list[int] = []
        self.broken = False  # whether the last call did not come to its end: nothing more can be asked

    # What rank 0 is asked for: every rank makes the same call.

    def read(self, parts):
        """Read parts of prompts side by side, on all ranks; see Runner."""
        return self.together("read", parts=[asdict(part) for part in parts])

    def step(self, slots, ids, draw=True):
        """Feed one token to each of some sequences, on all ranks; see Runner."""
        return self.together("step", slots=slots, ids=ids, draw=draw)

    def verify(self, slots, ids):
        """Feed several tokens to each of some sequences, on all ranks; see Runner."""
        return self.together("verify", slots=slots, ids=ids)

    def commit(self, slots, counts):
        """Keep the first of the tokens that were verified, on all ranks; see Runner."""
        self.verified(slots, counts)
        self.together("commit", slots=slots, counts=counts)

    def speculate(self, slots, ids, counts):
        """Feed one token to each of some sequences, and drafts of it, on all ranks; see Runner."""
        return self.together("speculate", slots=slots, ids=ids, counts=counts)

    def keep(self, slots, counts):
        """Keep the first of the tokens that `speculate` drew, on all ranks; see Runner."""
        self.verified(slots, counts)
        self.together("keep", slots=slots, counts=counts)

    def fork(self, slot, into):
        """Copy the sequence of a slot into others, on all ranks; see Runner."""
        self.forkable(slot, into)
        self.together("fork", slot=slot, into=into)

    def snapshot(self, slot, name, start=0):
        """Keep copies of a slot's states under `name`, on all ranks; see Runner."""
        return self.together("snapshot", slot=slot, name=name, start=start)

    def restore(self, slot, names, ids, how):
        """Put a sequence into a free slot from snapshots, on all ranks; see Runner."""
        self.together("restore", slot=slot, names=names, ids=ids, how=asdict(how))

    def forget(self, names, points):
        """Forget snapshots on all ranks; see Runner."""
        self.together("forget", names=names, points=points)

    def collect(self, name):
        """Return a snapshot of the whole model, on rank 0."""
        return self.together("collect", name=name)

    def spread(self, name, arrays):
        """Send each rank its part of the arrays of the whole model, to keep under a name."""
        self.spreading = arrays
        self.together("spread", name=name)
        self.spreading = {}

    def fits(self, lengths):
        """Return whether every rank has memory for what sequences have yet to take; see Runner."""
        return self.together("fits", lengths=lengths)

    def logits(self, ids):
        """Return teacher-forced logits [tokens v] on every rank."""
        return self.together("logits", ids=ids)

    def score(self, ids):
        """Return the scores of a text on every rank."""
        return self.together("score", ids=ids)

    def fill(self, slots, context):
        """Put noise into slots of all ranks; for measurements."""
        self.together("fill", slots=slots, context=context)

    def peak_memory(self):
        """Return the most bytes that a rank has held."""
        return self.together("peak_memory")

    def drop(self, slots):
        """Free slots here; the other ranks are told with the next call, or at once if no slot is left.

        They wait for the next call with a timeout while a slot has a sequence, and without one otherwise.
        """
        self.dropped += slots
        self.free(slots)
        if slots and not (self.homes or self.broken or self.closed):
            self.together("rest")

    def close(self) -> None:
        """Tell the other ranks that nothing more will be asked."""
        if self.comm.rank == 0 and not (self.broken or self.closed):
            self.comm.broadcast(None)
        super().close()

    def follow(self) -> None:
        """Make this rank's part of all calls of rank 0, until it closes its runner."""
        while request := self.comm.broadcast(idle=not self.homes):
            self.perform(**request)
        super().close()

    def together(self, call: str, **arguments) -> Any:
        """Broadcast a call, with the slots dropped since the last one, and return this rank's result.

        Raises RankError after a call that did not come to its end: the other ranks may still be within it.
        """
        if self.broken:
            raise RankError("an earlier call over these ranks was interrupted: start the job again")
        dropped, self.dropped, self.broken = self.dropped, [], True
        request: dict[str, Any] = {"call": call, "dropped": dropped, "arguments": arguments}
        self.comm.broadcast(request)
        result = self.perform(**request)
        self.broken = False
        return result

    def perform(self, call: str, dropped: list[int], arguments: dict) -> Any:
        """Make this rank's part of a call, and return its result."""
        self.free(dropped)
        match call:
            case "read":
                return super().read([_part(**part) for part in arguments["parts"]])
            case "step":
                return super().step(**arguments)
            case "verify":
                return self.part_of_verify(**arguments)
            case "commit":
                return super().commit(**arguments)
            case "speculate":
                return super().speculate(**arguments)
            case "keep":
                return super().keep(**arguments)
            case "fork":
                return super().fork(**arguments)
            case "snapshot":
                return self.part_of_snapshot(**arguments)
            case "restore":
                self.homes[arguments["slot"]] = None
                return super().restore(**arguments | {"how": _how(arguments["how"])})
            case "forget":
                return super().forget(**arguments)
            case "collect":
                return self.part_of_collect(**arguments)
            case "spread":
                return self.part_of_spread(**arguments)
            case "fits":
                return not self.largest(not super().fits(**arguments))
            case "logits":
                return self.part_of_logits(**arguments)
            case "score":
                return self.part_of_score(**arguments)
            case "fill":
                return self.part_of_fill(**arguments)
            case "peak_memory":
                return self.largest(peak_memory())
        return None  # "rest": nothing but the slots that were dropped

    # One rank's part of a call.

    @property
    def is_last(self) -> bool:
        """Return whether this rank belongs to the last stage, which has the logits."""
        return self.shard.at[2] == self.shard.layout.pp - 1

    @property
    def leaders(self) -> dict[int, int]:
        """Return the ranks that draw for the sequences of the latest call, and how many each has."""
        sizes = self.seats.sizes[:1] if self.seats.repeated else self.seats.sizes
        return {self.leader(e): size for e, size in enumerate(sizes)}

    @property
    def draws(self) -> bool:
        """Return whether this rank draws tokens of the latest call."""
        return self.comm.rank in self.leaders

    def has(self, slot: int) -> bool:
        """Return whether the states of a slot are on this rank."""
        return self.homes[slot] in (None, self.shard.at[1])

    def leader(self, e: int) -> int:
        """Return the rank that draws for the sequences of rank e of ep."""
        tp, ep, pp = self.shard.layout.tp, self.shard.layout.ep, self.shard.layout.pp
        return tp * (e + ep * (pp - 1))

    def sit(self, seats: Seats) -> None:
        """Set which sequences of a call each rank of ep has; the experts' operations depend on it."""
        if seats.sizes != self.seats.sizes or seats.repeated != self.seats.repeated:
            split = None if seats.repeated else seats.sizes
            backend = ranks.sharded(self.plain, self.whole, self.shard, self.comm, split)
            self.model = replace(self.model, backend=backend)
        self.seats = seats

    def free(self, slots: list[int]) -> None:
        """Free slots on this rank."""
        for slot in slots:
            self.homes.pop(slot, None)
        LocalRunner.drop(self, slots)

    def call(self, slots, rows, fresh, wanted, prompts=False):
        """Feed this rank's rows of a call; return the draws of all rows."""
        mine = self.seat(slots, fresh)
        width, hidden = max(map(len, rows)), self.drafts(slots, prompts)
        logits = self.forward(*_padded(slots, rows, fresh, mine), any(wanted) or width == 1, width, hidden)
        self.slots.drop([-1])
        self.drafter.follow(slots, rows, mine, self.latest, prompts)
        if width > 1 and not any(wanted):
            return [None] * len(slots)
        return self.share([slots[i] for i in mine], slots, wanted, logits)

    def seat(self, slots: list[int], fresh: list[int]) -> list[int]:
        """Assign the sequences of a call to ranks, and return the numbers of this rank's."""
        e = self.shard.at[1]
        seats, homes = Seats.of_slots(slots, fresh, self.homes, self.shard.layout.ep)
        self.sit(seats)
        elsewhere = [slot for slot in slots if homes[slot] not in (None, e)]
        self.slots.drop(elsewhere)
        self.drafter.slots.drop(elsewhere)
        self.homes |= homes
        self.mine = [i for i in seats.of[e] if i is not None]
        return self.mine

    def share(self, mine: list[int], slots: list[int], wanted: list[bool], logits: np.ndarray) -> list:
        """Draw where the logits are, and return what all sequences of the call drew."""
        counts = [self.drawings[slot].logprobs or 0 for slot in slots]
        want, e = dict(zip(slots, wanted, strict=True)), self.shard.at[1]
        drawn = np.full((len(self.seats.of[e]), 2 + 2 * max(counts)), -1.0)
        repeated = self.seats.repeated
        heard = {
            self.leader(at): np.empty((size, drawn.shape[1])) for at, size in enumerate(self.seats.sizes)
        }
        if repeated:
            heard = {self.leader(0): np.empty_like(drawn)}
        if self.comm.rank in heard:
            for line, slot, row in zip(drawn, mine, logits, strict=False):
                if want[slot]:
                    _write(line, self.drawn(slot, row))
            heard[self.comm.rank] = drawn
        self.comm.share(drawn if self.comm.rank in heard else None, heard)
        draws: list[Draw | InputError | None] = [None] * len(slots)
        for seats, lines in zip(self.seats.of, heard.values(), strict=False):
            for i, line in zip(seats, lines, strict=False):
                if i is not None:
                    drawing = self.drawings[slots[i]]
                    draws[i] = found = _read(line, drawing.logprobs)
                    if found and not (self.comm.rank in heard and slots[i] in mine):
                        drawing.follow(found.id)
        return draws

    def drawn(self, slot: int, logits: np.ndarray) -> Draw:
        """Return what a slot draws; raises RankError where that cannot be: other ranks stop too."""
        found = super().drawn(slot, logits)
        if isinstance(found, InputError):
            raise RankError(str(found))
        return found

    def part_of_verify(self, slots: list[int], ids: list[list[int]]) -> list[np.ndarray]:
        """Return the logits [tokens v] of each sequence; this rank records those it has."""
        self.seat(slots, [])
        found = self.exchange(self.feed(slots, ids)[0], len(slots))
        return [logits[: len(row)] for logits, row in zip(found, ids, strict=True)]

    def feed(self, slots, rows):
        """Return the logits and hidden states of this rank's rows, which it records."""
        own_slots, own_rows, new = _padded(slots, rows, [], self.mine)
        h, records = self.record(own_slots, own_rows, new, max(map(len, rows)))
        self.slots.drop([-1])
        replayed = self.replayed(records, *self.shard.layers(self.whole))
        self.recorded = list(slots), [len(row) for row in rows], (self.mine, replayed)
        return self.head(h), self.drafter.fetched(h)

    def exchange(self, own: np.ndarray, count: int) -> list[np.ndarray]:
        """Return an array for each of the `count` sequences of a call, of those of the ranks that draw.

        own: this rank's, one after the other; not read on other ranks, but of the right shape.
        """
        heard = {rank: np.empty((size, *own.shape[1:])) for rank, size in self.leaders.items()}
        mine = heard.get(self.comm.rank)
        if mine is not None:
            mine[:] = own
        self.comm.share(mine, heard)
        found = {
            i: rows[at]
            for of, rows in zip(self.seats.of, heard.values(), strict=False)
            for at, i in enumerate(of)
        }
        return [found[i] for i in range(count)]

    def exchanged(self, tokens, count):
        """Return the tokens of all sequences of a call."""
        own = np.full((len(self.seats.of[self.shard.at[1]]), 1), -1.0)
        own[: len(tokens), 0] = tokens
        return [int(row[0]) for row in self.exchange(own, count)]

    def shared(self, found, slots, most):
        """Return what all sequences of a call drew; the generators of those drawn elsewhere move on."""
        drawings = [self.drawings[slot] for slot in slots]
        wide = 2 + 2 * max(drawing.logprobs or 0 for drawing in drawings)
        own = np.full((len(self.seats.of[self.shard.at[1]]), 2 + most * wide), -1.0)
        for line, i in zip(own, self.mine, strict=False):
            if i in found:
                if isinstance(found[i], InputError):
                    raise RankError(str(found[i]))
                draws, used = found[i]
                line[:2] = len(draws), used
                for part, draw in zip(line[2:].reshape(most, wide), draws, strict=False):
                    _write(part, draw)
        runs = []
        for i, (line, drawing) in enumerate(zip(self.exchange(own, len(slots)), drawings, strict=True)):
            count, used = map(int, line[:2])
            if i not in found:
                drawing.generator.random(used)
            runs.append([_read(part, drawing.logprobs) for part in line[2:].reshape(most, wide)[:count]])
        return runs

    def replay(self, slots, replayed, counts):
        """Store the states of this rank's slots after the tokens that are kept."""
        mine, replayed = replayed
        if mine:
            super().replay([slots[i] for i in mine], replayed, [counts[i] for i in mine])

    def copy(self, slot, into):
        """Store copies of the states of a slot in others, on the ranks that have it."""
        self.homes |= dict.fromkeys(into, self.homes[slot])
        if self.homes[slot] in (None, self.shard.at[1]):
            super().copy(slot, into)

    def part_of_snapshot(self, slot: int, name: int, start: int) -> tuple[int, int]:
        """Keep this rank's part of a slot's states, on every rank of ep; return the most bytes of a rank."""
        home, others = self.homes[slot], self.shard.across
        if home is None or home == self.shard.at[1]:
            found = self.remembered(slot, start)
            self.send_arrays({} if home is None else dict.fromkeys(others, found), [])
        else:
            found = self.send_arrays({}, [others[home]])[others[home]]
        sizes = self.shelf.put(name, found)
        return self.largest(sizes[0]), self.largest(sizes[1])

    def part_of_collect(self, name: int) -> Arrays:
        """Return a snapshot of the whole model on rank 0; the first rank of ep of each part sends its."""
        mine, layout = self.shelf.kept[name], self.shard.layout
        senders = [rank for rank in range(layout.ranks) if Shard(layout, rank).at[1] == 0]
        if self.comm.rank:
            self.send_arrays({0: mine} if self.comm.rank in senders else {}, [])
            return {}
        parts = {0: mine} | self.send_arrays({}, senders[1:])
        return whole_of(((Shard(layout, rank), arrays) for rank, arrays in parts.items()), self.whole)

    def part_of_spread(self, name: int) -> None:
        """Keep this rank's part of the arrays that rank 0 has."""
        if self.comm.rank:
            mine = self.send_arrays({}, [0])[0]
        else:
            shards = [Shard(self.shard.layout, rank) for rank in range(self.comm.count)]
            parts = {shard.rank: cut(self.spreading, self.whole, shard) for shard in shards}
            self.send_arrays(parts, [])
            mine = parts[0]
        self.shelf.put(name, mine)

    def send_arrays(self, out: dict[int, Arrays], sources: list[int]) -> dict[int, Arrays]:
        """Send arrays to other ranks, and return those that the ranks `sources` send here."""
        self.comm.verb = "send"
        sent = {rank: packed(arrays) for rank, arrays in out.items() if rank != self.comm.rank}
        sizes = {rank: np.empty(1, np.int64) for rank in sources}
        self.comm.exchange({rank: np.array([len(raw)]) for rank, raw in sent.items()}, sizes)
        found = {rank: np.empty(int(size[0]), np.uint8) for rank, size in sizes.items()}
        self.comm.exchange(sent, found)
        return {rank: unpacked(raw) for rank, raw in found.items()}

    def part_of_logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits of one sequence, from the last stage."""
        self.sit(Seats.split(1, self.shard.layout.ep))
        found = [self.head(h)[0] for _, h in self.hidden(ids)]
        leader = self.leader(0)
        heard = {leader: np.empty((len(ids), self.whole.vocab_size), np.float64)}
        if self.comm.rank == leader:
            heard[leader] = np.concatenate(found).astype(np.float64)
        self.comm.share(heard[leader] if self.comm.rank == leader else None, heard)
        return heard[leader]

    def part_of_score(self, ids: list[int]) -> Scores:
        """Return the scores of a text: the last stage has the logits, and the prediction head."""
        self.sit(Seats.split(1, self.shard.layout.ep))
        scores, leader, size = Scores(ids), self.leader(0), max(0, len(ids) - 1)
        if self.is_last:
            scores = super().score(ids)
        else:
            for _ in self.hidden(ids):
                pass
        if size:
            guesses = size - 1 if self.config.mtp_layers else 0
            heard = {leader: np.array(scores.trunk + scores.head or [0.0] * (size + guesses))}
            self.comm.share(heard[leader] if self.comm.rank == leader else None, heard)
            scores = Scores(ids, heard[leader][:size].tolist(), heard[leader][size:].tolist())
        return scores

    def part_of_fill(self, slots: list[int], context: int) -> None:
        """Put noise into this rank's slots."""
        self.sit(seats := Seats.split(len(slots), self.shard.layout.ep))
        mine = [slots[i] for i in seats.of[self.shard.at[1]] if i is not None]
        for e, rows in enumerate(seats.of):
            self.homes |= {slots[i]: None if seats.repeated else e for i in rows if i is not None}
        self.drawings |= {slot: Drawing(Sampling(temperature=0), 0) for slot in slots}
        self.slots.keep(mine, self.filled(len(mine), context, self.plain))

    def largest(self, number: float) -> int:
        """Return the largest of the numbers of all ranks."""
        heard = {rank: np.array([float(number)]) for rank in range(self.comm.count)}
        self.comm.share(heard[self.comm.rank], heard)
        return round(max(float(found[0]) for found in heard.values()))

    def new_states(self, batch):
        """Return the states of this rank's stage for sequences that have read nothing."""
        return ranks.new_states(self.model, self.shard, batch)

    def blocks(self, ids, states, lengths=None, record=False) -> tuple[Any, list]:
        """Run this rank's stage."""
        array = self.model.backend.array
        lengths = None if lengths is None else array(lengths)
        return ranks.stage(self.model, self.shard, self.comm, array(ids), states, lengths, record)

    def head(self, h, positions=None):
        """Return logits on the last stage, and an array of their shape that is never read on others."""
        if self.is_last:
            return super().head(h, positions)
        shape = h.shape[: 2 if positions is None else 1]
        return np.empty((*shape, self.whole.vocab_size), np.float32)


def _padded(
    slots: list[int], rows: list[list[int]], fresh: list[int], mine: list[int]
) -> tuple[list[int], list[list[int]], list[int]]:
    """Return the slots, rows and fresh slots of one rank's sequences.

    Without one it has a row of padding in slot -1, because a rank must take part in every exchange.
    """
    own = [slots[i] for i in mine] or [-1]
    new = [slot for slot in own if slot in fresh or slot == -1]
    return own, [rows[i] for i in mine] or [[0]], new


def _part(how: dict | None, **part) -> Part:
    """Return a Part from its broadcast form."""
    return Part(how=_how(how) if how else None, **part)


def _how(how: dict) -> How:
    """Return sampling options from their broadcast form."""
    return How(**(how | {"sampling": Sampling(**how["sampling"])}))


def _write(line: np.ndarray, draw: Draw) -> None:
    """Write a draw into a row of numbers: the token or -1, ln p, the likeliest, and theirs."""
    k = len(draw.top)
    line[0] = draw.id
    line[1] = np.nan if draw.logprob is None else draw.logprob
    line[2 : 2 + 2 * k] = np.ravel(draw.top)


def _read(line: np.ndarray, logprobs: int | None) -> Draw | None:
    """Return the draw of such a row, with the `logprobs` likeliest tokens; None if nothing was drawn."""
    if line[0] < 0:
        return None
    if logprobs is None:
        return Draw(int(line[0]))
    pairs = line[2 : 2 + 2 * logprobs].reshape(-1, 2)
    return Draw(
        int(line[0]), float(line[1]), tuple((int(token), float(p)) for token, p in pairs if token >= 0)
    )

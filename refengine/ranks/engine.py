"""The engine of one rank: its part of the model, and the talk with the others that a text needs.

Rank 0 reads prompts and prints texts; the others follow. All of them run the same loop of generation.py: what
it needs to know, the tokens, comes from the ranks that have the logits, the first of tp on the last stage.
Several sequences are split over ep, one is repeated there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from refengine.engine import Engine, Scores
from refengine.generation import Draw, Options, Text
from refengine.ranks.comm import RankError, Ranks
from refengine.ranks.seats import Seats
from refengine.spec import ranks, state
from refengine.spec.config import InputError
from refengine.spec.ops import Backend
from refengine.spec.shard import Shard


@dataclass
class RankEngine(Engine):
    """Engine, as one of several ranks: rank 0 is used as any engine is, the others call `follow`."""

    comm: Ranks = field(repr=False)
    shard: Shard
    plain: Backend = field(repr=False)  # before it knew of other ranks
    seats: Seats = field(repr=False, default=Seats(((),)))

    def run(self, rows, options):
        return self.ask("run", rows=rows, options=asdict(options))

    def score(self, prompt):
        return next(self.ask("score", ids=self.ids(prompt)))

    def bench(self, **how) -> Iterator[dict]:
        """The rows of rank_bench.py, of all ranks together."""
        return self.ask("bench", **how)

    def ask(self, what: str, **how) -> Iterator:
        """All ranks do the same, and rank 0 uses what comes out of it."""
        self.comm.broadcast({"what": what} | how)
        return self.part(what, **how)

    def follow(self) -> None:
        """Do a rank's part in all that rank 0 is asked for, until it ends."""
        while request := self.comm.broadcast(idle=True):
            for _ in self.part(**request):
                pass

    def part(self, what: str, **how) -> Iterator:
        """This rank's part in what was asked for."""
        match what:
            case "run":
                return super().run(how["rows"], Options(**how["options"]))
            case "score":
                return iter([self._score(how["ids"])])
        from refengine.ranks.bench import bench

        return bench(self, **how)

    def _score(self, ids: list[int]) -> Scores:
        """The last stage has the logits, and the prediction head; everyone hears."""
        self.seats = Seats.split(1, self.shard.layout.ep)
        self._seated()
        scores, leader, size = Scores(ids), self._leader(0), max(0, len(ids) - 1)
        if self.is_last:
            scores = super().score(ids)
        else:
            for _ in self.read([ids]):
                pass
        if size:
            guesses = size - 1 if self.config.mtp_layers else 0
            heard = {leader: np.array(scores.trunk + scores.head or [0.0] * (size + guesses))}
            self.comm.share(heard[leader] if self.comm.rank == leader else None, heard)
            scores = Scores(ids, heard[leader][:size].tolist(), heard[leader][size:].tolist())
        return scores

    def barrier(self) -> None:
        """Go on when the last stage has done what came before."""
        heard = {self._leader(e): np.zeros(1) for e in range(self.shard.layout.ep)}
        self.comm.share(heard.get(self.comm.rank), heard)

    def largest(self, number: float) -> float:
        """Of the numbers of all ranks."""
        heard = {rank: np.array([float(number)]) for rank in range(self.comm.count)}
        self.comm.share(heard[self.comm.rank], heard)
        return float(max(heard.values())[0])

    def close(self) -> None:
        """Nothing more will be asked."""
        self.comm.broadcast(None)

    @property
    def is_last(self) -> bool:
        return self.shard.at[2] == self.shard.layout.pp - 1

    def prefill(self, rows, width=0):
        self.seats = Seats.split(len(rows), self.shard.layout.ep)
        self._seated()
        return super().prefill([rows[i] for i in self.seats.of[self.shard.at[1]]], max(map(len, rows)))

    def decode(self, ids, states):
        return super().decode([0 if i is None else ids[i] for i in self.seats.of[self.shard.at[1]]], states)

    def take(self, states, rows):
        self.seats, kept = self.seats.stay(rows)
        self._seated()
        return state.take(states, kept[self.shard.at[1]])

    def step(self, ids, states, n=None):
        array = self.model.backend.array
        n = None if n is None else array(n)
        return ranks.step(self.model, self.shard, self.comm, array(ids), states, n)

    def new_states(self, batch):
        return ranks.new_states(self.model, self.shard, batch)

    def head(self, h, rows=None):
        if self.is_last:
            return super().head(h, rows)
        shape = h.shape[: 2 if rows is None else 1]
        return np.empty((*shape, self.config.vocab_size), np.float32)  # nobody reads it

    def draw(self, texts, logits):
        """The ranks that have logits draw; everyone hears what."""
        likeliest = texts[0].options.logprobs or 0
        e = self.shard.at[1]
        drawn = np.full((len(self.seats.of[e]), 2 + 2 * likeliest), -1.0)
        heard = {self._leader(e): np.empty((size, drawn.shape[1])) for e, size in enumerate(self.seats.sizes)}
        if self.seats.repeated:
            heard = {self._leader(0): np.empty_like(drawn)}
        if self.comm.rank in heard:
            for line, row, i in zip(drawn, logits, self.seats.of[e], strict=True):
                if i is not None:
                    _write(line, self._draw(texts[i], row))
            heard[self.comm.rank] = drawn
        self.comm.share(drawn if self.comm.rank in heard else None, heard)
        draws: list[Draw | None] = [None] * len(texts)
        for seats, lines in zip(self.seats.of, heard.values(), strict=False):
            for i, line in zip(seats, lines, strict=True):
                if i is not None:
                    draws[i] = _read(line, texts[i].options.logprobs is not None)
        return draws

    def _draw(self, text: Text, logits: np.ndarray) -> Draw | None:
        try:
            return text.draw(logits)
        except InputError as error:
            raise RankError(str(error)) from None  # the others cannot go on either

    def _leader(self, e: int) -> int:
        """The rank that draws for the sequences of rank e of ep."""
        tp, ep, pp = self.shard.layout.tp, self.shard.layout.ep, self.shard.layout.pp
        return tp * (e + ep * (pp - 1))

    def _seated(self) -> None:
        """The verbs of the model know how many sequences each rank of ep has."""
        split = None if self.seats.repeated else self.seats.sizes
        cfg = self.checkpoint.config
        self.model = replace(self.model, backend=ranks.sharded(self.plain, cfg, self.shard, self.comm, split))


def _write(line: np.ndarray, draw: Draw | None) -> None:
    """A draw as a row of numbers: the token or -1, ln p, the likeliest, and theirs."""
    if draw is not None:
        k = len(draw.top)
        line[0] = draw.id
        line[1] = np.nan if draw.logprob is None else draw.logprob
        line[2 : 2 + 2 * k] = np.ravel(draw.top)


def _read(line: np.ndarray, with_logprobs: bool) -> Draw | None:
    if line[0] < 0:
        return None
    if not with_logprobs:
        return Draw(int(line[0]))
    top = tuple((int(token), float(logprob)) for token, logprob in line[2:].reshape(-1, 2))
    return Draw(int(line[0]), float(line[1]), top)

"""Connections between ranks, in processes and in threads, for arrays of NumPy and of PyTorch.

    Solo                                   one rank, which has nobody to talk to
    threads.Threads                        ranks of one process, for tests
    mpi.MPI                                mpi4py, under mpiexec
    torch_distributed.TorchDistributed     torch.distributed (gloo; NCCL between GPUs), under torchrun

A subclass gives one verb, `exchange`: arrays that leave and arrays to be filled, all at the same time. A rank
is waited for until `timeout` seconds after its last heartbeat (heartbeat.py). A sum is added up in order of
rank by everyone, so its bits are the same on every rank and in every run: small ones whole, large ones in
slices that are then put together, which sends what a ring would. Whoever waits yields the processor, and
hears when another rank has stopped.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any

import numpy as np

from refengine.ranks.comm.heartbeat import Heartbeat
from refengine.spec.arrays import DTYPES
from refengine.spec.config import InputError
from refengine.spec.layout import span

TIMEOUT = 20.0  # seconds without a sign of life
WHOLE = 2**16  # bytes up to which a sum is sent whole to everyone: one round instead of two
FLOATS = {dtype.name: dtype for dtype in DTYPES.values()}
NAMES = list(FLOATS)  # their order is that of the numbers sent
AHEAD = 16  # messages that a stage may be ahead of the next
RECORD = 4096  # bytes of what a rank says about itself


class RankError(InputError):
    """Another rank is gone, does not answer, or is not what this one needs."""


class Ranks:
    """One of `count` ranks; see refengine.spec.ranks.Comm for what its verbs mean."""

    name = "solo"

    def __init__(self, rank: int = 0, count: int = 1, timeout: float = TIMEOUT):
        self.rank, self.count, self.timeout = rank, count, timeout
        self.sent: Counter[str] = Counter()  # bytes that this rank sent, by verb
        self.verb = ""
        self.heartbeat = Heartbeat(rank, timeout)
        self.missed: int | None = None  # a rank whose connection has ended
        self.done = False  # rank 0 has said that nothing more will be asked

    def exchange(self, out: dict[int, Any], into: dict[int, Any], idle: bool = False) -> None:
        """Send out[peer] and fill into[peer], by peer. idle: a rank that gives no sign is waited for too."""
        raise NotImplementedError

    def post(self, x, to: int) -> None:
        """Send without waiting for the receiver."""
        raise NotImplementedError

    def alarm(self, why: str) -> None:
        """Tell every rank that this one stops."""

    def at_work(self) -> None:
        """In the midst of a computation: this rank is not lost, it is busy."""

    def finish(self) -> None:
        """When all ranks have done all that was asked for: whatever is still under way arrives."""

    def leave(self, code: int) -> None:
        """End the connection; with a code other than 0 end the process too: no rank waits for another."""

    def all_reduce(self, x, peers):
        if len(peers) == 1:
            return x
        self.verb = "all_reduce"
        if len(peers) == 2 or x.nbytes <= WHOLE:
            x = solid(x)
            terms = {peer: x if peer == self.rank else empty(x.shape, x) for peer in peers}
            self._say(dict.fromkeys(terms, x), terms)
            return total([terms[peer] for peer in peers])
        sizes = [len(span(size(x), len(peers), i)) for i in range(len(peers))]
        mine = self.reduce_scatter(x.reshape(-1), peers, sizes)
        return self.all_gather(mine, peers, sizes, 0).reshape(x.shape)

    def all_gather(self, x, peers, sizes, axis):
        if len(peers) == 1:
            return x
        self.verb = "all_gather"
        x, axis = solid(x), axis % x.ndim
        shape, parts = list(x.shape), {}
        for peer, width in zip(peers, sizes, strict=True):
            shape[axis] = width
            parts[peer] = x if peer == self.rank else empty(tuple(shape), x)
        self._say(dict.fromkeys(parts, x), parts)
        return joined([parts[peer] for peer in peers], axis)

    def reduce_scatter(self, x, peers, sizes):
        if len(peers) == 1:
            return x
        self.verb = "reduce_scatter"
        stops = list(accumulate(sizes))
        rows = {p: solid(x[stop - n : stop]) for p, n, stop in zip(peers, sizes, stops, strict=True)}
        mine = rows[self.rank]
        terms = {peer: mine if peer == self.rank else empty(mine.shape, x) for peer in peers}
        self._say(rows, terms)
        return total([terms[peer] for peer in peers])

    def send(self, x, to):
        self.verb = "send"
        x = solid(x)
        shape = [NAMES.index(str(x.dtype).removeprefix("torch.")), x.ndim, *x.shape]
        self.post(np.array(shape + [0] * (8 - len(shape)), np.int64), to)
        self.post(x, to)
        self.sent["send"] += x.nbytes

    def receive(self, source, like):
        self.verb = "receive"
        header = np.empty(8, np.int64)
        self.exchange({}, {source: header})
        kind, ndim, *shape = (int(value) for value in header)
        x = empty(tuple(shape[:ndim]), like, NAMES[kind])
        self.exchange({}, {source: x})
        return x

    def broadcast(self, value: Any = None, idle: bool = False) -> Any:
        """What rank 0 says, a JSON value, to all of them: None if it is the last, after which all finish.

        idle: they wait for it as long as it takes.
        """
        self.verb = "broadcast"
        others = [rank for rank in range(self.count) if rank != 0]
        if self.rank == 0:
            text = np.array(list(json.dumps(value).encode()), np.uint8)
            self.exchange(dict.fromkeys(others, np.array([len(text)])), {})
            self.exchange(dict.fromkeys(others, text), {})
        else:
            self.exchange({}, {0: (length := np.empty(1, np.int64))}, idle)
            self.exchange({}, {0: (text := np.empty(int(length[0]), np.uint8))})
            value = json.loads(text.tobytes())
        self.done = value is None
        if self.done:
            self.finish()
        return value

    def share(self, mine: np.ndarray | None, heard: dict[int, np.ndarray]) -> None:
        """What some ranks say to all: `mine` if this is one of them; `heard`, by rank, is filled."""
        self.verb = "share"
        others = [rank for rank in range(self.count) if rank != self.rank]
        out = {} if mine is None else dict.fromkeys(others, mine)
        self.exchange(out, {rank: x for rank, x in heard.items() if rank != self.rank})

    def compare(self, mine: dict[str, str]) -> None:
        """RankError unless every rank says the same about itself."""
        self.verb = "compare"
        text = json.dumps(mine).encode().ljust(RECORD)
        others = [rank for rank in range(self.count) if rank != self.rank]
        theirs = {rank: np.empty(RECORD, np.uint8) for rank in others}
        self.exchange(dict.fromkeys(others, np.array(list(text), np.uint8)), theirs)
        for rank in others:
            said = json.loads(theirs[rank].tobytes())
            for key in mine | said:
                if mine.get(key) != said.get(key):
                    unlike = f"{said.get(key)}, not {mine.get(key)}"
                    raise RankError(f"rank {rank} has another {key} than rank {self.rank}: {unlike}")

    def _say(self, out: dict, into: dict) -> None:
        """Exchange with all but oneself."""
        out = {peer: x for peer, x in out.items() if peer != self.rank}
        self.sent[self.verb] += sum(x.nbytes for x in out.values())
        self.exchange(out, {peer: x for peer, x in into.items() if peer != self.rank})

    def silent(self, peers) -> RankError:
        names = f"rank{'s' * (len(peers) > 1)} {', '.join(map(str, sorted(peers)))}"
        return RankError(f"{names} did not answer within {self.timeout:g} s ({self.verb})")

    def lost(self, peer: int) -> RankError:
        return RankError(f"the connection to rank {peer} is lost ({self.verb})")

    def stopped(self, peer: int, why: str) -> Exception:
        """An alarm without a reason: whoever read our output has left."""
        return RankError(f"rank {peer} stopped: {why}") if why else BrokenPipeError()


class Solo(Ranks):
    """One rank, which has nobody to talk to."""

    def exchange(self, out, into, idle=False):
        assert not out and not into


def empty(shape: tuple[int, ...], like, dtype: str | None = None):
    """An array of the library (and device) of `like`, and of its dtype unless another is named."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, FLOATS[dtype] if dtype else like.dtype)
    return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype) if dtype else None)


def solid(x):
    """Contiguous."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()


def size(x) -> int:
    return x.size if isinstance(x, np.ndarray) else x.numel()


def joined(parts: list, axis: int):
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    return sys.modules["torch"].cat(parts, axis)


def total(terms: list):
    """The sum in the order given; of numbers shorter than float32, in float32."""
    if isinstance(terms[0], np.ndarray) or terms[0].element_size() >= 4:
        return reduce(add, terms)
    return reduce(add, [term.float() for term in terms]).to(terms[0].dtype)


def memory(x) -> np.ndarray:
    """The bytes of an array in the memory of the processor, to be read or written."""
    if not isinstance(x, np.ndarray):
        x = x.reshape(-1).view(sys.modules["torch"].uint8).numpy() if x.numel() else np.empty(0, np.uint8)
    return x.reshape(-1).view(np.uint8)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

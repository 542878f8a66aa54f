"""Connections between ranks, in processes and in threads, for arrays of NumPy and of PyTorch.

    Solo                                   a single rank
    threads.Threads                        ranks of one process, for tests
    mpi.MPI                                mpi4py, under mpiexec
    torch_distributed.TorchDistributed     torch.distributed (gloo; NCCL between GPUs), under torchrun

A subclass implements `exchange`, which sends and receives several arrays at the same time, and `post`. A
waiting rank gives up `timeout` seconds after the last heartbeat of its peer (heartbeat.py), yields the
processor meanwhile, and raises as soon as another rank reports that it stopped. all_reduce adds in order of
rank on every rank, so the result has the same bits on all ranks and in all runs. A small array is sent whole
to every peer; a large one takes reduce_scatter and all_gather, which together send as many bytes as a ring.
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

TIMEOUT = 20.0  # seconds without a heartbeat
WHOLE = 2**16  # bytes up to which all_reduce sends the whole array to every peer: one round instead of two
FLOATS = {dtype.name: dtype for dtype in DTYPES.values()}
NAMES = list(FLOATS)  # a dtype is sent as its index in this list
AHEAD = 16  # messages that a stage may be ahead of the next
RECORD = 4096  # bytes of the record that `compare` exchanges


class RankError(InputError):
    """Raised when another rank is gone, exceeds the timeout, or differs in version or options."""


class Ranks:
    """Connect one of `count` ranks; the collective operations are those of refengine.spec.ranks.Comm.

    `timeout` is in seconds. Every wait raises RankError once a peer is considered dead, and the exception
    that `stopped` returns once another rank reported that it stopped.
    """

    name = "solo"

    def __init__(self, rank: int = 0, count: int = 1, timeout: float = TIMEOUT):
        self.rank, self.count, self.timeout = rank, count, timeout
        self.sent: Counter[str] = Counter()  # bytes that this rank sent, by operation
        self.verb = ""  # the operation under way, for messages
        self.heartbeat = Heartbeat(rank, timeout)
        self.missed: int | None = None  # a rank whose connection has ended
        self.done = False  # rank 0 has broadcast the end

    def exchange(self, out: dict[int, Any], into: dict[int, Any], idle: bool = False) -> None:
        """Send out[peer] to and fill into[peer] from each peer; return when all are done.

        idle: wait without a timeout.
        """
        raise NotImplementedError

    def post(self, x, to: int) -> None:
        """Send `x` to the rank `to` and return without waiting for its receiver."""
        raise NotImplementedError

    def alarm(self, why: str) -> None:
        """Send every rank the reason why this one stops; "": stdout was closed (broken pipe)."""

    def at_work(self) -> None:
        """Send a heartbeat if one is due; called during a computation. Raises if another rank has stopped."""

    def finish(self) -> None:
        """Complete every message under way; called by all ranks when all requests are done."""

    def leave(self, code: int) -> None:
        """Close the connection; with a code other than 0, exit the process at once."""

    def all_reduce(self, x, peers):
        """Return the sum of `x` over the peers, in its shape: the same bits on each of them."""
        if len(peers) == 1:
            return x
        self.verb = "all_reduce"
        if len(peers) == 2 or x.nbytes <= WHOLE:
            x = contiguous(x)
            terms = {peer: x if peer == self.rank else empty(x.shape, x) for peer in peers}
            self._exchange(dict.fromkeys(terms, x), terms)
            return total([terms[peer] for peer in peers])
        sizes = [len(span(size(x), len(peers), i)) for i in range(len(peers))]
        mine = self.reduce_scatter(x.reshape(-1), peers, sizes)
        return self.all_gather(mine, peers, sizes, 0).reshape(x.shape)

    def all_gather(self, x, peers, sizes, axis):
        """Return the peers' arrays concatenated along `axis`; sizes[i]: the length of that of peers[i]."""
        if len(peers) == 1:
            return x
        self.verb = "all_gather"
        x, axis = contiguous(x), axis % x.ndim
        shape, parts = list(x.shape), {}
        for peer, width in zip(peers, sizes, strict=True):
            shape[axis] = width
            parts[peer] = x if peer == self.rank else empty(tuple(shape), x)
        self._exchange(dict.fromkeys(parts, x), parts)
        return concatenated([parts[peer] for peer in peers], axis)

    def reduce_scatter(self, x, peers, sizes):
        """Return this rank's rows of the sum of `x` over the peers; sizes[i]: number of rows of peers[i]."""
        if len(peers) == 1:
            return x
        self.verb = "reduce_scatter"
        stops = list(accumulate(sizes))
        rows = {p: contiguous(x[stop - n : stop]) for p, n, stop in zip(peers, sizes, stops, strict=True)}
        mine = rows[self.rank]
        terms = {peer: mine if peer == self.rank else empty(mine.shape, x) for peer in peers}
        self._exchange(rows, terms)
        return total([terms[peer] for peer in peers])

    def send(self, x, to):
        """Send an array of any shape, with its dtype and shape, to the rank `to`; does not wait for it."""
        self.verb = "send"
        x = contiguous(x)
        shape = [NAMES.index(str(x.dtype).removeprefix("torch.")), x.ndim, *x.shape]
        self.post(np.array(shape + [0] * (8 - len(shape)), np.int64), to)
        self.post(x, to)
        self.sent["send"] += x.nbytes

    def receive(self, source, like):
        """Return the array that the rank `source` sent, in the library and on the device of `like`."""
        self.verb = "receive"
        header = np.empty(8, np.int64)
        self.exchange({}, {source: header})
        kind, ndim, *shape = (int(value) for value in header)
        x = empty(tuple(shape[:ndim]), like, NAMES[kind])
        self.exchange({}, {source: x})
        return x

    def broadcast(self, value: Any = None, idle: bool = False) -> Any:
        """Return on every rank the JSON value that rank 0 passed; None is the last one, and calls `finish`.

        idle: the other ranks wait for it without a timeout.
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
        """Broadcast from several ranks at once: send `mine` to all ranks, fill heard[rank] for each sender.

        mine: None if this rank is not one of the senders.
        """
        self.verb = "share"
        others = [rank for rank in range(self.count) if rank != self.rank]
        out = {} if mine is None else dict.fromkeys(others, mine)
        self.exchange(out, {rank: x for rank, x in heard.items() if rank != self.rank})

    def compare(self, mine: dict[str, str]) -> None:
        """Raise RankError, which names the first difference, unless every rank passes the same values."""
        self.verb = "compare"
        text = json.dumps(mine).encode().ljust(RECORD)
        others = [rank for rank in range(self.count) if rank != self.rank]
        theirs = {rank: np.empty(RECORD, np.uint8) for rank in others}
        self.exchange(dict.fromkeys(others, np.array(list(text), np.uint8)), theirs)
        for rank in others:
            other = json.loads(theirs[rank].tobytes())
            for key in mine | other:
                if mine.get(key) != other.get(key):
                    unlike = f"{other.get(key)}, not {mine.get(key)}"
                    raise RankError(f"rank {rank} has a different {key} than rank {self.rank}: {unlike}")

    def _exchange(self, out: dict, into: dict) -> None:
        """Exchange with all peers but this rank, and count the bytes sent."""
        out = {peer: x for peer, x in out.items() if peer != self.rank}
        self.sent[self.verb] += sum(x.nbytes for x in out.values())
        self.exchange(out, {peer: x for peer, x in into.items() if peer != self.rank})

    def timed_out(self, peers) -> RankError:
        """Return the error for peers without a heartbeat within the timeout."""
        names = f"rank{'s' * (len(peers) > 1)} {', '.join(map(str, sorted(peers)))}"
        return RankError(f"{names} did not answer within {self.timeout:g} s ({self.verb})")

    def connection_lost(self, peer: int) -> RankError:
        """Return the error for a peer whose connection has ended."""
        return RankError(f"the connection to rank {peer} is lost ({self.verb})")

    def stopped(self, peer: int, why: str) -> Exception:
        """Return the error for a peer that reported why it stops; without a reason, its stdout was closed."""
        return RankError(f"rank {peer} stopped: {why}") if why else BrokenPipeError()


class Solo(Ranks):
    """Stand in for the connection of a single rank; operations return their argument."""

    def exchange(self, out, into, idle=False):
        """Check that there is no peer to exchange with."""
        assert not out and not into


def empty(shape: tuple[int, ...], like, dtype: str | None = None):
    """Return an empty array in the library and on the device of `like`; dtype: by default its own."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, FLOATS[dtype] if dtype else like.dtype)
    return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype) if dtype else None)


def contiguous(x):
    """Return `x` if its memory is contiguous, else a contiguous copy."""
    return np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x.contiguous()


def size(x) -> int:
    """Return the number of elements of an array."""
    return x.size if isinstance(x, np.ndarray) else x.numel()


def concatenated(parts: list, axis: int):
    """Return the arrays concatenated along `axis`."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    return sys.modules["torch"].cat(parts, axis)


def total(terms: list):
    """Return the sum of the arrays in the order given; dtypes shorter than float32 are added in float32."""
    if isinstance(terms[0], np.ndarray) or terms[0].element_size() >= 4:
        return reduce(add, terms)
    return reduce(add, [term.float() for term in terms]).to(terms[0].dtype)


def memory(x) -> np.ndarray:
    """Return the bytes of a contiguous array in host memory as a writable uint8 view."""
    if not isinstance(x, np.ndarray):
        x = x.reshape(-1).view(sys.modules["torch"].uint8).numpy() if x.numel() else np.empty(0, np.uint8)
    return x.reshape(-1).view(np.uint8)

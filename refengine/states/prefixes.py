"""Prefixes of prompts that need not be read again: keep their snapshots, and choose where a prompt starts.

The loop calls `begin` when a sequence gets a slot, `stop` for where a call has to end, `after_read` and
`at_end`. The runner has the snapshots, by name; the tree of names is here:

    a node   the keys and values of the positions since its parent's end, shared by all longer prefixes
    a point  the states of the Mamba layers at its end, of constant size; a start needs a point

Points are made at multiples of the length of a call, after the last end token of a prompt, and where a
sequence ends. Over the budget, the point that was used longest ago is dropped, and then the nodes that
lead to no other point.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from refengine.states.state import State, of_generator, of_sampling

if TYPE_CHECKING:
    from refengine.loop import Sequence as Running
    from refengine.runner import How, Runner
    from refengine.states.disk import Disk


@dataclass(eq=False)
class Node:
    """Holds one boundary of a prefix: its name in the runner, and the bytes that it has there."""

    name: int
    key: bytes
    end: int
    parent: Node | None
    bytes_of_keys: int = 0
    bytes_of_point: int = 0
    children: int = 0

    def path(self) -> list[Node]:
        """Return the nodes from the beginning of the prefix to this one."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


@dataclass
class Prefixes:
    """Decides where sequences start, and which points are kept.

    budget: bytes that a rank may keep; 0: nothing is kept. ends: a function that returns the end tokens.
    exactly: keep points at multiples of the length of a call alone, so that a prefix has the same bits
    whether it is reused or read. model: a function that returns the model's fingerprint; title: the name of
    its directory.
    """

    runner: Runner
    budget: int = 0
    ends: Callable[[], Collection[int]] = frozenset
    exactly: bool = False
    model: Callable[[], str] = str
    title: str = ""
    disk: Disk | None = None  # where points of prompts are kept for other processes
    nodes: dict[bytes, Node] = field(default_factory=dict)
    points: dict[bytes, Node] = field(default_factory=dict)  # those used longest ago first
    lengths: Counter[int] = field(default_factory=Counter)  # how many points end after so many tokens
    total: int = 0  # bytes of all nodes

    def __post_init__(self):
        self.names = count()

    # What the loop calls.

    def begin(self, sequence: Running, how: How) -> None:
        """Put a sequence into its slot as far as its state, or a point of its prefix, has read it."""
        state = sequence.start.state
        if self.budget or sequence.start.keep == "turn":
            sequence.turn = turn(sequence.ids, self.ends())
        before = sequence.turn if sequence.start.keep == "turn" else 0  # the state is to be taken there
        ids = sequence.ids[: before + 1] if before else sequence.ids
        found = self.longest(ids) if self.budget else None
        if self.disk:
            known = max(found.end if found else 0, state.position if state else 0)
            state = self.disk.longest(ids, known) or state
        if state is not None and (found is None or found.end <= state.position):
            self.resume(sequence, state, how)
        elif found is not None:
            self.touch(found)
            names = [node.name for node in found.path()]
            self.runner.restore(sequence.slot, names, sequence.ids[: found.end], how)
            sequence.read = sequence.reused = found.end
            sequence.node = found
        if sequence.read:
            self.capture(sequence)

    def stop(self, sequence: Running, length: int) -> int:
        """Return where the next call for a prompt ends; it has at most `length` positions."""
        ids, read, keep = sequence.ids, sequence.read, sequence.start.keep
        if not (self.budget or keep or sequence.reused):
            return min(len(ids), read + length)
        stops = {len(ids), (read // length + 1) * length}
        if keep == "turn" or not self.exactly:
            stops.add(sequence.turn)
        if keep == "end" and sequence.text.full:
            stops.add(len(ids) - 1)
        return min(stop for stop in stops if stop > read)

    def after_read(self, sequences: Iterable[Running], length: int) -> None:
        """Keep points, and states that are to be returned, where prompts have been read up to a boundary."""
        for sequence in sequences:
            read, ids = sequence.read, sequence.ids
            at_turn = read == sequence.turn
            self.capture(sequence)
            if read % length == 0 or (at_turn and not self.exactly):
                self.keep(sequence, ids[:read])
            last = 0 if self.exactly else sequence.turn
            if (
                self.disk
                and read == (last or len(ids) // length * length)
                and not self.disk.holds(ids[:read])
            ):
                state = self.state(sequence, ids[:read], read)
                self.disk.keep(replace(state, sampling={}, generator=None))

    def capture(self, sequence: Running) -> None:
        """Take the state of a sequence if this is the point in its prompt where it is to be returned."""
        keep, read, ids = sequence.start.keep, sequence.read, sequence.ids
        if keep == "turn" and (read == sequence.turn or (read == len(ids) and sequence.kept is None)):
            sequence.kept = self.state(sequence, ids[: read + 1], read)
        if keep == "end" and sequence.text.full and read == len(ids) - 1:
            sequence.kept = self.state(sequence, ids, read)

    def at_end(self, sequence: Running) -> None:
        """Keep a point where a sequence ends, and its state if that is to be returned."""
        if not (self.budget or sequence.start.keep):
            return
        ids = self.runner.drawings[sequence.slot].ids
        position = max(len(sequence.ids), len(ids) - 1)  # the token that was drawn last has not been read
        if sequence.start.keep == "end" and sequence.kept is None:
            sequence.kept = self.state(sequence, ids, position)
        if not self.exactly:
            self.keep(sequence, ids[:position])

    # Points.

    def longest(self, ids: Sequence[int]) -> Node | None:
        """Return the node with the longest prefix of `ids` that has a point and leaves a token to read."""
        found = None
        for key in keys(ids, sorted(end for end in self.lengths if end < len(ids))):
            found = self.points.get(key, found)
        return found

    def keep(self, sequence: Running, ids: Sequence[int]) -> None:
        """Keep a point of a sequence that has read `ids`, unless there is one, and make room for it."""
        if not self.budget:
            return
        (key,) = keys(ids, [len(ids)])
        if key not in self.points:
            node = self.nodes.get(key) or Node(next(self.names), key, len(ids), self.alive(sequence.node))
            start = node.parent.end if node.parent else 0
            self.add(node, *self.runner.snapshot(sequence.slot, node.name, start))
        sequence.node = self.points[key]
        self.touch(sequence.node)
        self.shrink()

    def add(self, node: Node, bytes_of_keys: int, bytes_of_point: int) -> None:
        """Enter a node whose snapshot has been made, or its point."""
        if node.key not in self.nodes and node.parent:
            node.parent.children += 1
        self.total += bytes_of_keys - node.bytes_of_keys + bytes_of_point
        node.bytes_of_keys, node.bytes_of_point = bytes_of_keys, bytes_of_point
        self.nodes[node.key] = self.points[node.key] = node
        self.lengths[node.end] += 1

    def alive(self, node: Node | None) -> Node | None:
        """Return the last node of a path that is still kept."""
        while node is not None and self.nodes.get(node.key) is not node:
            node = node.parent
        return node

    def touch(self, node: Node) -> None:
        """Note that a point was used now."""
        self.points[node.key] = self.points.pop(node.key)

    def shrink(self) -> None:
        """Forget points, those used longest ago first, until the rest is within the budget."""
        names: list[int] = []
        points: list[int] = []
        while self.total > self.budget and self.points:
            oldest = self.points.pop(next(iter(self.points)))
            self.total -= oldest.bytes_of_point
            self.lengths[oldest.end] -= 1
            if not self.lengths[oldest.end]:
                del self.lengths[oldest.end]
            points.append(oldest.name)
            node: Node | None = oldest
            while node is not None and not node.children and node.key not in self.points:
                del self.nodes[node.key]
                self.total -= node.bytes_of_keys
                names.append(node.name)
                if node.parent:
                    node.parent.children -= 1
                node = node.parent
        if points:
            self.runner.forget(names, points)

    # Whole states.

    def state(self, sequence: Running, ids: Sequence[int], position: int) -> State:
        """Return the state of a sequence as it is now, after `position` of these tokens."""
        name, drawing = next(self.names), self.runner.drawings[sequence.slot]
        self.runner.snapshot(sequence.slot, name)
        arrays = self.runner.collect(name)
        self.runner.forget([name], [])
        sampling = of_sampling(drawing.sampling, drawing.seed)
        generator = of_generator(drawing.generator)
        return State(self.model(), tuple(ids), position, arrays, self.title, sampling, generator)

    def resume(self, sequence: Running, state: State, how: How) -> None:
        """Put a sequence into its slot as a state has it."""
        name = next(self.names)
        self.runner.spread(name, state.arrays)
        self.runner.restore(sequence.slot, [name], list(state.ids[: state.position]), how)
        self.runner.forget([name], [])
        sequence.read = sequence.reused = state.position


def turn(ids: Sequence[int], ends: Collection[int]) -> int:
    """Return the position after the last end token within a prompt, or 0."""
    return next((i for i in range(len(ids) - 1, 0, -1) if ids[i - 1] in ends), 0)


def keys(ids: Sequence[int], ends: Iterable[int]) -> Iterator[bytes]:
    """Yield a digest of the first `end` tokens for each of some ends, which ascend."""
    digest, before, numbers = hashlib.blake2b(digest_size=16), 0, np.asarray(ids, np.int32)
    for end in ends:
        digest.update(numbers[before:end].tobytes())
        before = end
        yield digest.digest()

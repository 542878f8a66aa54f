"""Chapter 22. Ranks: several of them compute what one would, and this is all that they say to each other.

    g(h up') down' = g(h up_1') down_1' + g(h up_2') down_2' + ...         g: each channel by itself

A rank reads the whole of h and computes its share of the width in the middle (heads, groups, channels,
experts), so what it writes is one term of a sum, and one sum over ranks ends the mixer. Whatever stands
between that share and the sum is linear and may as well come before it: `out_proj`, the weights of the
experts, `fc2_latent_proj`. Other words are few:

    a norm group on several ranks    the sum of their means of squares, one number a token
    embedding                        a sum: a rank has some rows of the table, and zeros for other tokens
    logits, eh_proj                  the ranks' parts end to end
    a stage                          hands the stream to the next

To the mixers a rank is a smaller model: a smaller Config, smaller weights, and verbs that know of the others.
The router is whole on every rank, and all must choose alike, so a sum has to have the same bits on each of
its ranks. docs/ranks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spec.config import Config
from spec.layout import span, unit
from spec.model import Model
from spec.moe import Routing
from spec.ops import Backend
from spec.shard import Shard, cut, rows
from spec.tensors import Group, placed


@runtime_checkable
class Comm(Protocol):
    """What connects ranks. Arrays are the backend's; `peers` are all the ranks that make the same call."""

    def sum(self, x: Any, peers: tuple[int, ...]) -> Any: ...  # each peer gets the same bits
    def gather(self, x: Any, peers: tuple[int, ...]) -> Any: ...  # end to end, along the last axis
    def send(self, x: Any, to: int) -> None: ...
    def receive(self, source: int) -> Any: ...


def part(cfg: Config, read: Callable[[str], np.ndarray], backend: Backend, shard: Shard, comm: Comm) -> Model:
    """The model of one rank; `read(name)` is a whole tensor in the file's dtype, perhaps in a memory map."""

    def place(group: Group):
        return backend.place(group, [cut(row, read(row.name), cfg, shard) for row in group.rows])

    return Model(shard.local(cfg), placed(rows(cfg, shard), place), sharded(backend, cfg, shard, comm))


def sharded(backend: Backend, cfg: Config, shard: Shard, comm: Comm) -> Backend:
    """The same backend, with verbs that know of the other ranks."""
    ops, (t, _, _), tp, ep = backend.ops, shard.at, shard.layout.tp, shard.layout.ep
    verbs = {}
    if tp > 1:
        peers, vocabulary = shard.peers(tp), span(cfg.vocab_size, tp, t, unit(cfg.vocab_size))

        def embed(ids, table):
            mine = (ids >= vocabulary.start) & (ids < vocabulary.stop)
            return comm.sum(ops.embed((ids - vocabulary.start) * mine, table) * mine[..., None], peers)

        verbs["embed"] = embed
        verbs["logits"] = lambda h, lm_head: comm.gather(ops.logits(h, lm_head), peers)
        verbs["linear_pair"] = lambda x, y, weight: comm.gather(ops.linear_pair(x, y, weight), peers)
    if tp > cfg.n_groups > 0:
        of_group = shard.peers(tp // cfg.n_groups)
        verbs["gated_rms_norm"] = partial(
            ops.gated_rms_norm, mean=lambda squares: comm.sum(squares, of_group) / len(of_group)
        )
    if ep > 1:
        first, last = shard.experts(cfg).start, shard.experts(cfg).stop

        def experts(u, matrices, routing):  # the choice is among all; those of other ranks have no width here
            up, down = matrices[0]
            mine = (routing.expert >= first) & (routing.expert < last)
            expert = np.where(mine, routing.expert - first, len(matrices))
            return ops.experts(u, [*matrices, (up[:0], down[:, :0])], Routing(expert, routing.weight))

        verbs["experts"] = experts

    def all_reduce(x, kind: str):
        peers = shard.peers(tp * ep if kind == "E" else tp)
        return comm.sum(x, peers) if len(peers) > 1 else x

    return replace(backend, ops=replace(ops, all_reduce=all_reduce, **verbs))


def new_states(model: Model, shard: Shard, batch: int) -> list:
    """What the layers of this rank's stage remember before the first token."""
    first, last = shard.layers(model.cfg)
    return [model.backend.new_state(kind, model.cfg, batch) for kind in model.cfg.layers[first:last]]


def step(model: Model, shard: Shard, comm: Comm, ids, states: list, n=None):
    """This stage's part of a call: ids b l -> the stream b l d, which on the last stage `head` reads."""
    (first, last), stage = shard.layers(model.cfg), shard.layout.tp * shard.layout.ep
    x = model.embed(ids) if first == 0 else comm.receive(shard.rank - stage)
    x, states = model.blocks(x, states, n, first, last)
    if last < len(model.cfg.layers):
        comm.send(x, shard.rank + stage)
    return x, states

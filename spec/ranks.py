"""Chapter 22. Ranks: several of them compute what one would, and this is all that they say to each other.

    g(h up') down' = g(h up_1') down_1' + g(h up_2') down_2' + ...         g: each channel by itself

A rank reads the whole of h and computes its share of the width in the middle (heads, groups, channels), so
what it writes is one term of a sum, and one sum over the ranks of tp ends the mixer. Whatever stands between
that share and the sum is linear and may as well come before it: `out_proj`, `fc2_latent_proj`. Routed
experts are a sum already, and the ranks of ep have some of its terms each: they add them up in the latent
width, which is up to four times narrower than the stream. Other words are few:

    a norm group on several ranks    the sum of their means of squares, one number a token
    embedding                        a sum: a rank has some rows of the table, and zeros for other tokens
    logits, eh_proj                  the ranks' parts end to end
    a stage                          hands the stream to the next

On one row the ranks of ep repeat what is not an expert. Several rows they can split: then each asks the
others for their tokens' latents, and hands the sums back.

To the mixers a rank is a smaller model: a smaller Config, smaller weights, and verbs that know of the others.
The router is whole on every rank, and all that share a token must choose alike for it, so a sum has to have
the same bits on each of its ranks. docs/ranks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from refengine.spec.config import Config
from refengine.spec.layout import span, unit
from refengine.spec.model import Model
from refengine.spec.ops import Backend
from refengine.spec.shard import Shard, cut, rows
from refengine.spec.tensors import Group, placed


@runtime_checkable
class Comm(Protocol):
    """What connects ranks. Arrays are the backend's; `peers` are all the ranks that make the same call.

    `sizes` are the lengths, along the axis that is cut, of what each of the peers has or gets.
    """

    def all_reduce(self, x: Any, peers: tuple[int, ...]) -> Any: ...  # each peer gets the same bits
    def all_gather(
        self, x: Any, peers: tuple[int, ...], sizes: list[int], axis: int
    ) -> Any: ...  # end to end
    def reduce_scatter(
        self, x: Any, peers: tuple[int, ...], sizes: list[int]
    ) -> Any: ...  # its rows of the sum
    def send(self, x: Any, to: int) -> None: ...
    def receive(self, source: int, like: Any) -> Any: ...  # in the library and on the device of `like`


def part(cfg: Config, read: Callable[[str], np.ndarray], backend: Backend, shard: Shard, comm: Comm) -> Model:
    """The model of one rank; `read(name)` is a whole tensor in the file's dtype, perhaps in a memory map."""

    def place(group: Group):
        return backend.place(group, [cut(row, read(row.name), cfg, shard) for row in group.rows])

    return Model(shard.local(cfg), placed(rows(cfg, shard), place), sharded(backend, cfg, shard, comm))


def sharded(
    backend: Backend, cfg: Config, shard: Shard, comm: Comm, split: list[int] | None = None
) -> Backend:
    """The same backend, with verbs that know of the other ranks.

    split: how many rows of the batch each rank of ep has; None: all of them have all rows.
    """
    ops, (t, _, _), tp = backend.ops, shard.at, shard.layout.tp
    peers, others, verbs = shard.peers(tp), shard.across, {}
    if tp > 1:
        mine, vocabulary = span(cfg.vocab_size, tp, t, unit(cfg.vocab_size)), sizes(cfg.vocab_size, tp)
        widths = sizes(cfg.hidden_size, tp)

        def embed(ids, table):
            here = (ids >= mine.start) & (ids < mine.stop)
            return comm.all_reduce(ops.embed((ids - mine.start) * here, table) * here[..., None], peers)

        def logits(h, lm_head):
            return comm.all_gather(ops.logits(h, lm_head), peers, vocabulary, -1)

        def linear_pair(x, y, weight):
            return comm.all_gather(ops.linear_pair(x, y, weight), peers, widths, -1)

        verbs |= {"embed": embed, "logits": logits, "linear_pair": linear_pair}
        verbs["all_reduce"] = lambda x, kind: comm.all_reduce(x, peers)
    if tp > cfg.n_groups > 0:
        of_group = shard.peers(tp // cfg.n_groups)
        verbs["gated_rms_norm"] = partial(
            ops.gated_rms_norm, mean=lambda squares: comm.all_reduce(squares, of_group) / len(of_group)
        )
    if len(others) > 1:
        first = shard.experts(cfg).start

        def experts(u, matrices, routing):
            if split is None:
                return comm.all_reduce(ops.experts(u, matrices, routing, first), others)
            u, *routes = (comm.all_gather(x, others, split, 0) for x in (u, *routing))
            return comm.reduce_scatter(ops.experts(u, matrices, type(routing)(*routes), first), others, split)

        verbs["experts"] = experts
    # A whole step meets other ranks at the end of a mixer only, not at its experts, its norm or a stage.
    whole = len(others) == 1 and shard.layout.pp == 1 and not tp > cfg.n_groups > 0
    step = backend.step_of_ranks if whole else None
    return replace(backend, ops=replace(ops, **verbs), step=step, step_of_ranks=None)


def sizes(width: int, parts: int) -> list[int]:
    """How the parts of a width differ, where they do."""
    return [len(span(width, parts, i, unit(width))) for i in range(parts)]


def new_states(model: Model, shard: Shard, batch: int) -> list:
    """What the layers of this rank's stage remember before the first token."""
    first, last = shard.layers(model.cfg)
    return [model.backend.new_state(kind, model.cfg, batch) for kind in model.cfg.layers[first:last]]


def step(model: Model, shard: Shard, comm: Comm, ids, states: list, n=None):
    """This stage's part of a call: ids b l -> the stream b l d, which on the last stage `head` reads."""
    (first, last), stage = shard.layers(model.cfg), shard.layout.tp * shard.layout.ep
    x = model.embed(ids) if first == 0 else comm.receive(shard.rank - stage, ids)
    x, states = model.blocks(x, states, n, first, last)
    if last < len(model.cfg.layers):
        comm.send(x, shard.rank + stage)
    return x, states

"""Chapter 22. Ranks: how several ranks compute one model together, and every message they exchange.

    g(h up') down' = g(h up_1') down_1' + g(h up_2') down_2' + ...         g: each channel by itself

A rank reads the whole of h and computes its share of the inner width (heads, groups or channels). Its output
is one term of a sum, so one all_reduce over the ranks of tp ends each mixer. The layers between that share
and the sum are linear and are applied before it: `out_proj`, `fc2_latent_proj`. The output of routed experts
is a sum too, of which each rank of ep holds some terms; these are added in the latent width, up to four times
narrower than the stream. The other messages:

    a norm group on several ranks    all_reduce of their means of squares, one number per token
    embedding                        all_reduce: a rank holds some rows of the table, zeros for other tokens
    logits, eh_proj                  all_gather of the ranks' parts
    a stage                          sends the stream to the next stage

With one sequence, every ep rank repeats all work except the routed experts. With several, each ep rank can
have its own sequences: all_gather collects the latents of all tokens, and reduce_scatter returns the sums.

For the mixers a rank is a smaller model: a smaller Config, smaller weights, and ops that communicate. Every
rank holds the whole router, and all ranks that process a token must select the same experts for it, so an
all_reduce must have the same bits on each of its ranks. docs/ranks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from refengine.spec.arrays import Weight
from refengine.spec.config import Config
from refengine.spec.layout import span, unit
from refengine.spec.model import Model
from refengine.spec.ops import Backend, placed_by
from refengine.spec.shard import Shard, cut, held_tensors
from refengine.spec.tensors import Group, placed


@runtime_checkable
class Comm(Protocol):
    """Exchange arrays between ranks. Arrays are those of the backend; all `peers` make the same call.

    sizes[i] is the length, along the axis that is cut, of the part that peers[i] has or gets.
    """

    def all_reduce(self, x: Any, peers: tuple[int, ...]) -> Any:
        """Return the sum of `x` over the peers, with the same bits on each of them."""

    def all_gather(self, x: Any, peers: tuple[int, ...], sizes: list[int], axis: int) -> Any:
        """Return the peers' arrays concatenated along `axis`."""

    def reduce_scatter(self, x: Any, peers: tuple[int, ...], sizes: list[int]) -> Any:
        """Return this rank's rows of the sum of `x` over the peers."""

    def send(self, x: Any, to: int) -> None:
        """Send an array to the rank `to` without waiting for it."""

    def receive(self, source: int, like: Any) -> Any:
        """Return the array that `source` sent, in the library and on the device of `like`."""


def part(cfg: Config, read: Callable[[str], Weight], backend: Backend, shard: Shard, comm: Comm) -> Model:
    """Return the model of one rank; read(name) returns a whole tensor (or memory map) in the file's dtype."""

    def place(group: Group):
        return placed_by(backend, group, [cut(row, read(row.name), cfg, shard) for row in group.rows])

    weights = placed(held_tensors(cfg, shard), place)
    return Model(shard.local(cfg), weights, sharded(backend, cfg, shard, comm))


def sharded(
    backend: Backend, cfg: Config, shard: Shard, comm: Comm, split: list[int] | None = None
) -> Backend:
    """Return the backend of one rank: its ops communicate with the other ranks where the model is cut.

    split: the number of rows of the batch that each rank of ep has; None: every rank has all rows.
    """
    ops, (t, _, _), tp = backend.ops, shard.at, shard.layout.tp
    peers, others = shard.peers(tp), shard.across
    verbs: dict[str, Callable] = {}
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
    # A whole step communicates at the end of a mixer only, not in its experts, its norm or between stages.
    whole = len(others) == 1 and shard.layout.pp == 1 and not tp > cfg.n_groups > 0
    step = backend.step_of_ranks if whole else None
    return replace(
        backend, ops=replace(ops, **verbs), step=step, step_of_ranks=None, verify=None, predict=None
    )


def sizes(width: int, parts: int) -> list[int]:
    """Return the sizes of the parts of a width."""
    return [len(span(width, parts, i, unit(width))) for i in range(parts)]


def new_states(model: Model, shard: Shard, batch: int) -> list:
    """Return the initial states of the layers of this rank's stage, for `batch` sequences."""
    return model.new_states(batch, *shard.layers(model.cfg))


def stage(model: Model, shard: Shard, comm: Comm, ids, states: list, lengths=None, record=False):
    """Run the layers of this rank's stage: ids b l -> the stream b l d, and the next states.

    On the last stage the stream is for `head`. With `record`, records take the place of the states.
    """
    (first, last), apart = shard.layers(model.cfg), shard.layout.tp * shard.layout.ep
    x = model.embed(ids) if first == 0 else comm.receive(shard.rank - apart, ids)
    x, states = model.blocks(x, states, lengths, first, last, record=record)
    if last < len(model.cfg.layers):
        comm.send(x, shard.rank + apart)
    return x, states

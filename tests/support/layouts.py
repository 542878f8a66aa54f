"""List every layout of up to eight ranks, and draw models that they can cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from hypothesis import strategies as st

from refengine.conformance.cases import Case, cases, cut
from refengine.conformance.truth import agree_with_truth
from refengine.spec import mtp
from refengine.spec.config import Config
from refengine.spec.layout import Layout, span
from refengine.spec.ops import numpy_backend
from refengine.spec.ranks import new_states, part, sharded, stage
from refengine.spec.shard import Shard
from tests.support.ranks import overheard

EIGHT = range(1, 9)
LAYOUTS = [Layout(tp, ep, pp) for tp in EIGHT for ep in EIGHT for pp in EIGHT if tp * ep * pp <= 8]
EXACT = numpy_backend(np.float64)


def spelled(layout: Layout) -> str:
    """Return a layout as the name of a test case."""
    return f"tp{layout.tp}-ep{layout.ep}-pp{layout.pp}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Cuttable(Case):
    """Add to a case the widths of experts, shared expert and MLP, and the size of the vocabulary."""

    widths: tuple[int, int, int, int] = (13, 17, 31, 61)

    @cached_property
    def cfg(self) -> Config:
        """Return the configuration of the case with these widths."""
        expert, shared, dense, vocabulary = self.widths
        return replace(
            Case.cfg.func(self),
            moe_intermediate_size=expert,
            moe_shared_expert_intermediate_size=shared,
            intermediate_size=dense,
            vocab_size=vocabulary,
        )


@st.composite
def cuttable(draw, layout: Layout, **fixed) -> Cuttable:
    """Draw a case that the layout can cut: every kind of layer in any order, at least one per stage."""
    tp = layout.tp
    few = st.sampled_from([g for g in EIGHT if tp % g == 0] + [2 * tp])
    groups, kv, more = draw(few), draw(few), st.sampled_from((1, 3))
    layers = "".join(draw(st.permutations("M*E-"))) + draw(
        st.text("M*E-", min_size=max(0, layout.pp - 4), max_size=4)
    )
    sizes = {
        "n_groups": groups,
        "heads_per_group": math.lcm(groups, tp) // groups * draw(more),
        "attention": (math.lcm(kv, tp) * draw(more), kv),
        "tied": draw(st.booleans()),
    }
    case = draw(cases(layers, max_length=9, **sizes | fixed))
    odd_or_blocks = zip((13, 17, 31, 61), (144, 160, 176, 192), strict=True)  # blocks of 16: nine or more
    widths = tuple(draw(st.sampled_from(menu)) for menu in odd_or_blocks)
    return Cuttable(**{f.name: getattr(case, f.name) for f in fields(case)}, widths=widths)


def by_ranks(case: Case, layout: Layout, cuts=(), n=None, watch=None, split=False) -> tuple[list, list]:
    """Return the logits from every rank of the last stage, and those of its prediction head.

    split: the ranks of ep have their own rows of the batch.
    """
    case.read("backbone.norm_f.weight")  # so that one thread makes the checkpoint
    next_ids = np.roll(case.ids, -1, axis=1)

    def rank(comm):
        shard = Shard(layout, comm.rank)
        model, pieces, guesses = part(case.cfg, case.read, EXACT, shard, comm), [], []
        mine = slice(None)
        if split:
            spans = [span(case.batch, layout.ep, e) for e in range(layout.ep)]
            mine = slice(spans[shard.at[1]].start, spans[shard.at[1]].stop)
            own = sharded(EXACT, case.cfg, shard, comm, list(map(len, spans)))
            model = replace(model, backend=own)
        batch = len(case.ids[mine])
        states, head_states = new_states(model, shard, batch), mtp.new_states(model, batch)
        for piece in cut(case, cuts):
            ids = case.ids[mine, piece]
            real = None if n is None else np.clip(n[mine] - piece.start, 0, ids.shape[1])
            x, states = stage(model, shard, comm, ids, states, real)
            if shard.at[2] == layout.pp - 1:
                pieces.append(model.head(x))
            if case.mtp_layers and pieces:
                o, head_states = mtp.predict(model, x, next_ids[mine, piece], head_states, real)
                guesses.append(model.head(o))
        if watch:
            watch(shard, comm.said)
        return pieces and np.concatenate(pieces, axis=1), guesses and np.concatenate(guesses, axis=1)

    last = overheard(layout.ranks, rank)[-layout.tp * layout.ep :]
    return [logits for logits, _ in last], [guesses for _, guesses in last]


def sums_to_the_whole(case: Case, layout: Layout, cuts=(), n=None) -> None:
    """Check that all ranks hold the same logits, and that these agree with the truth."""
    logits, _ = by_ranks(case, layout, cuts, n)
    for other in logits[1:]:
        assert np.array_equal(other, logits[0]), "two ranks hold different logits"
    for row in range(case.batch):
        real = case.length if n is None else n[row]
        agree_with_truth(case, row, logits[0][row, :real], np.dtype(np.float64), at=slice(real))


def split_rows_are_the_whole(case: Case, layout: Layout, cuts=(), n=None) -> None:
    """Check the logits of ranks of ep with rows of their own: concatenated, they agree with the truth."""
    logits, _ = by_ranks(case, layout, cuts, n, split=True)
    logits = np.concatenate(logits[:: layout.tp])
    for row in range(case.batch):
        real = case.length if n is None else n[row]
        agree_with_truth(case, row, logits[row, :real], np.dtype(np.float64), at=slice(real))

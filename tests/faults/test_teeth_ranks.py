"""Each planted fault in the cuts and in the messages of ranks fails a law of test_shards_sum.py."""

from dataclasses import replace
from functools import partial

import numpy as np

from refengine.ranks.comm import Ranks
from refengine.spec import ranks, shard
from refengine.spec.layout import Layout
from refengine.spec.moe import Routing
from refengine.spec.shard import CUTS, Shard
from tests.support.layouts import Cuttable, split_rows_are_the_whole, sums_to_the_whole
from tests.support.teeth import Fault, each

CASE = Cuttable(layers="M*E-M", batch=2, length=5, n_groups=2, heads_per_group=4, attention=(8, 2))
TWO, FOUR, EIGHT, EXPERTS, STAGES = Layout(2), Layout(4), Layout(4, 2), Layout(1, 2), Layout(1, 1, 2)


def law(layout, case=CASE):
    return lambda backend: sums_to_the_whole(case, layout, cuts=(2,))


def split_law(layout, case=CASE):
    return lambda backend: split_rows_are_the_whole(case, layout, cuts=(2,))


def cut_as(**other):
    def plant(patch):
        for name, how in other.items():
            patch.setitem(CUTS, {"in_proj": "z|x|B|C|dt", "conv": "x|B|C"}.get(name, name), how)

    return plant


def verbs(change):
    """Return wrong verbs: change(ops before, ops of this rank, cfg, shard, comm)."""
    right = ranks.sharded

    def sharded(backend, cfg, here, comm, split=None):
        made = right(backend, cfg, here, comm, split)
        return replace(made, ops=replace(made.ops, **change(backend.ops, made.ops, cfg, here, comm)))

    return lambda patch: patch.setattr(ranks, "sharded", sharded)


def sum_over(count):
    """Sum over count(kind, tp, ep) ranks."""

    def change(plain, ops, cfg, here, comm):
        def all_reduce(x, kind):
            return comm.all_reduce(x, here.peers(count(kind, here.layout.tp, here.layout.ep)))

        return {"all_reduce": all_reduce}

    return verbs(change)


def answers_for_all_experts(plain, ops, cfg, here, comm):
    def experts(u, matrices, routing):
        here_all = Routing(routing.expert % len(matrices), routing.weight)
        return comm.all_reduce(plain.experts(u, matrices, here_all), here.across)

    return {"experts": experts}


def weighs_its_own_experts_only(plain, ops, cfg, here, comm):
    def experts(u, matrices, routing):
        first, last = here.experts(cfg).start, here.experts(cfg).stop
        w = np.where((routing.expert >= first) & (routing.expert < last), routing.weight, 0)
        share = w.sum(-1, keepdims=True) / routing.weight.sum(-1, keepdims=True)
        return ops.experts(u, matrices, Routing(routing.expert, w / np.where(share, share, 1)))

    return {"experts": experts}


def looks_up_tokens_of_others(plain, ops, cfg, here, comm):
    return {
        "embed": lambda ids, table: comm.all_reduce(
            plain.embed(ids % len(table), table), here.peers(here.layout.tp)
        )
    }


def logits_from_the_right(plain, ops, cfg, here, comm):
    def logits(h, lm_head):
        return np.roll(ops.logits(h, lm_head), len(lm_head), axis=-1)

    return {"logits": logits}


def keeps_its_experts_to_itself(plain, ops, cfg, here, comm):
    return {"experts": partial(plain.experts, first=here.experts(cfg).start)}


def sums_experts_twice(plain, ops, cfg, here, comm):
    """Sum in the latent width, and then again over all ranks."""

    def experts(u, matrices, routing):
        return comm.all_reduce(ops.experts(u, matrices, routing), here.peers(here.layout.tp * here.layout.ep))

    return {"experts": experts}


def counts_experts_from_nought(plain, ops, cfg, here, comm):
    def experts(u, matrices, routing):
        return comm.all_reduce(plain.experts(u, matrices, routing), here.across)

    return {"experts": experts}


def hands_back_rows_of_others(patch):
    right = Ranks.reduce_scatter
    patch.setattr(
        Ranks,
        "reduce_scatter",
        lambda self, x, peers, sizes: right(self, np.roll(x, 1, axis=0), peers, sizes),
    )


def asks_with_its_own_choice(patch):
    """Send the latents of all rows, but the experts that this rank's rows chose."""
    right = Ranks.all_gather

    def all_gather(self, x, peers, sizes, axis):
        whole = right(self, x, peers, sizes, axis)
        return whole if axis or x.dtype.kind == "f" else np.resize(x, whole.shape)

    patch.setattr(Ranks, "all_gather", all_gather)


def shares_in_turn(patch):
    """Give the first of two groups to ranks 0 and 2 instead of 0 and 1."""
    right = shard.span

    def span(size, parts, i, unit=1):
        return right(size, size, i % size, unit) if 0 < size < parts else right(size, parts, i, unit)

    patch.setattr(shard, "span", span)


def a_layer_in_two_stages(patch):
    right = Shard.layers

    def layers(self, cfg):
        first, last = right(self, cfg)
        return max(0, first - 1), last

    patch.setattr(Shard, "layers", layers)


FAULTS = [
    Fault("in_proj is cut in runs of rows", cut_as(in_proj=(0, "tp")), law(TWO)),
    Fault("the convolution is cut in runs of channels", cut_as(conv=(0, "tp")), law(TWO)),
    Fault(
        "out_proj is cut between blocks of 16, not between heads",
        cut_as(inner_columns=(1, "tp")),
        law(TWO, replace(CASE, heads_per_group=3, mamba_head_dim=8)),
        ValueError,
    ),
    Fault(
        "norm statistics of a rank, where a group spans two",
        lambda patch: patch.setattr(ranks, "partial", lambda verb, mean: verb),
        law(FOUR),
    ),
    Fault("what several ranks share is shared in turn", shares_in_turn, law(FOUR)),
    Fault("a rank of ep keeps its experts to itself", verbs(keeps_its_experts_to_itself), law(EIGHT)),
    Fault("what ep repeats is summed too", sum_over(lambda kind, tp, ep: tp * ep), law(EXPERTS)),
    Fault("attention is not summed", sum_over(lambda kind, tp, ep: 1 if kind == "*" else tp), law(TWO)),
    Fault("a sum of experts, and one more", verbs(sums_experts_twice), law(EXPERTS)),
    Fault("every rank counts experts from nought", verbs(counts_experts_from_nought), law(EXPERTS)),
    Fault("rows are handed back to another rank", hands_back_rows_of_others, split_law(EXPERTS)),
    Fault("rows of others go to one's own choice of experts", asks_with_its_own_choice, split_law(EXPERTS)),
    Fault("a rank answers for experts of others", verbs(answers_for_all_experts), law(EXPERTS)),
    Fault("weights are normalised among one's own experts", verbs(weighs_its_own_experts_only), law(EXPERTS)),
    Fault("tokens of other ranks are looked up too", verbs(looks_up_tokens_of_others), law(TWO)),
    Fault("logits are gathered from the right", verbs(logits_from_the_right), law(TWO)),
    Fault("a layer is in two stages", a_layer_in_two_stages, law(STAGES)),
]


@each(FAULTS)
def test_a_planted_fault_goes_red(fault, monkeypatch):
    fault.goes_red(monkeypatch)

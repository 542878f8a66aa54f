"""The cost model and the ranks agree on the bytes that are sent."""

from dataclasses import replace

import pytest

from refengine.ranks.comm.threads import on_each
from refengine.spec.layout import Layout
from refengine.spec.ranks import new_states, part, stage
from refengine.spec.shard import Shard
from tests.support.layouts import EXACT, LAYOUTS, Cuttable
from tools.bench.rank_model import H100, Link, messages, seconds
from tools.bench.rank_model import part as share

pytestmark = pytest.mark.slow


def sent(case, layout) -> float:
    """Return the bytes that all ranks together send in one call of the model."""

    def rank(comm):
        shard = Shard(layout, comm.rank)
        model = part(case.cfg, case.read, EXACT, shard, comm)
        x, _ = stage(model, shard, comm, case.ids, new_states(model, shard, case.batch))
        if shard.at[2] == layout.pp - 1:
            model.head(x)
        return sum(comm.sent.values())

    case.read("backbone.norm_f.weight")  # so that one thread makes the checkpoint
    return sum(on_each(layout.ranks, rank))


LARGE = [Layout(3), Layout(4), Layout(1, 4), Layout(4, 2), Layout(1, 3, 2)]
SIZES = [*((layout, 1) for layout in LAYOUTS), *((layout, 400) for layout in LARGE)]


@pytest.mark.parametrize(("layout", "length"), SIZES, ids=str)
def test_bytes_sent_are_those_of_the_formula(layout, length):
    """A sum for 400 tokens is larger than 64 KB, so it is sent in slices."""
    tp = layout.tp
    case = Cuttable(
        layers="ME*M-" + "M" * (layout.pp - 5),
        batch=1,
        length=length,
        n_groups=1,
        heads_per_group=2 * tp,
        mamba_head_dim=1,
        attention=(2 * tp, tp),
        widths=(144, 160, 176, 192),
    )
    tokens = case.batch * case.length
    expected = sum(
        message.sent
        for rank in range(layout.ranks)
        for message in messages(case.cfg, Shard(layout, rank), tokens, tokens, s=8, w=8)
    )
    assert sent(case, layout) == pytest.approx(expected, rel=1e-12)


def test_with_more_ranks_each_reads_less_and_sends_more():
    cfg = Cuttable(layers="ME*M-", n_groups=8, heads_per_group=1, attention=(8, 8)).cfg
    bytes_read = [share(cfg, "M", tp, 1, 1)[0] for tp in (1, 2, 4, 8)]
    assert bytes_read == sorted(bytes_read, reverse=True) and bytes_read[0] > 4 * bytes_read[-1]
    words = [seconds(cfg, Layout(tp), H100, 1, 1, 2)["talking"] for tp in (1, 2, 4, 8)]
    assert words == sorted(words) and words[0] == 0


def test_a_message_between_nodes_takes_the_far_link():
    cfg = Cuttable(layers="MM").cfg
    near, far = Link(1.0, 1e30), Link(9.0, 1e30)
    for node, latency in ((1, 9.0), (2, 1.0)):
        machine = replace(H100, near=near, far=far, node=node)
        assert seconds(cfg, Layout(1, 1, 2), machine, 1, 1, 2)["talking"] == pytest.approx(latency)

"""Every layout of up to eight ranks on the torch backend computes the whole model."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import CUTS, cut
from refengine.conformance.truth import agree_with_truth
from refengine.ranks.comm.threads import on_each
from refengine.spec import moe
from refengine.spec.layout import span
from refengine.spec.ops import DEFINITION
from refengine.spec.ranks import new_states, part, sharded, stage
from refengine.spec.shard import Shard
from tests.support.layouts import LAYOUTS, cuttable
from tests.support.torch_benches import ALL, on_all, placed, small, torch, values

SIZE = st.integers(1, 37)
SEED = st.integers(0, 9999)
LAYOUT = st.shared(st.sampled_from(LAYOUTS), key="layout")
SEVERAL = st.shared(st.sampled_from([of for of in LAYOUTS if of.ep > 1]), key="several")
LENGTH = st.sampled_from((1, 2, 40))  # a step, and enough tokens for the other way of multiplying


@pytest.fixture(autouse=True)
def one_thread_a_rank():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_ranks(case, layout, how, cuts, split) -> list:
    """Return the logits of every rank of the last stage; split: those of its own rows."""
    case.read("backbone.norm_f.weight")  # so that one thread makes the checkpoint
    here = how()

    def rank(comm):
        shard, mine, pieces = Shard(layout, comm.rank), slice(None), []
        model = part(case.cfg, case.read, here, shard, comm)
        if split:
            spans = [span(case.batch, layout.ep, e) for e in range(layout.ep)]
            mine = slice(spans[shard.at[1]].start, spans[shard.at[1]].stop)
            model = replace(model, backend=sharded(here, case.cfg, shard, comm, list(map(len, spans))))
        states = new_states(model, shard, len(case.ids[mine]))
        for piece in cut(case, cuts):
            x, states = stage(model, shard, comm, here.array(case.ids[mine, piece]), states)
            if shard.at[2] == layout.pp - 1:
                pieces.append(here.fetch(model.head(x)))
        return pieces and np.concatenate(pieces, axis=1)

    return on_each(layout.ranks, rank)[-layout.tp * layout.ep :]


HOW = [p for p in ALL if p.id in ("torch-float32", "torch-bfloat16")]  # whose activations are float32


@pytest.mark.parametrize("how", HOW)
@given(layout=LAYOUT, case=LAYOUT.flatmap(cuttable), cuts=CUTS)
def test_shards_sum_to_the_whole(how, layout, case, cuts):
    logits = by_ranks(case, layout, how, cuts, split=False)
    for other in logits[1:]:
        assert np.array_equal(other, logits[0]), "two ranks hold different logits"
    for row in range(case.batch):
        agree_with_truth(case, row, logits[0][row], np.dtype(np.float32))


@pytest.mark.parametrize("how", HOW)
@given(layout=SEVERAL, case=SEVERAL.flatmap(cuttable), cuts=CUTS, more=st.integers(0, 2))
def test_ranks_that_split_the_rows_compute_the_whole(how, layout, case, cuts, more):
    case = replace(case, batch=layout.ep + more)
    logits = np.concatenate(by_ranks(case, layout, how, cuts, split=True)[:: layout.tp])
    for row in range(case.batch):
        agree_with_truth(case, row, logits[row], np.dtype(np.float32))


STACKED = [p for p in ALL if p.values[0].name in ("torch-float32", "torch-bfloat16-units")]  # their own dtype
FORMS = [(p, False) for p in ALL] + [(p, True) for p in STACKED]
FORMS = [pytest.param(*p.values, form, id=p.id + "-stacked" * form, marks=p.marks) for p, form in FORMS]


@pytest.mark.parametrize(("how", "stacked"), FORMS)
@given(seed=SEED, tokens=LENGTH, x=SIZE, E=st.integers(2, 9), k=st.integers(1, 4), data=st.data())
def test_a_range_of_the_experts_adds_its_share_and_nothing_else(how, stacked, seed, tokens, x, E, k, data):
    here, k, rng = how(), min(k, E), np.random.default_rng(seed)
    first = data.draw(st.integers(0, E - 1))
    last = data.draw(st.integers(first + 1, E))
    u = values(how, seed, 1, tokens, x)
    pairs = [
        (values(how, seed + e, 13, x, scale=0.3), values(how, seed + e, x, 13, scale=0.3)) for e in range(E)
    ]
    expert = np.argsort(rng.random((1, tokens, E)))[..., :k]
    weight = how.rounded(rng.random((1, tokens, k)))
    share = [pair if first <= e < last else (0 * pair[0], pair[1]) for e, pair in enumerate(pairs)]
    expected = DEFINITION.experts(u, share, moe.Routing(expert, weight))
    experts = placed(how, *(m for pair in pairs[first:last] for m in pair), name="experts")
    experts = as_on_a_device(experts) if stacked else experts
    routing = moe.Routing(here.array(expert), here.array(weight.astype(np.float32)))
    y = here.ops.experts(here.give(u), experts, routing, first=first)
    how.near(here.fetch(y), expected, x + 13 * k, "experts")


def as_on_a_device(listed):
    from refengine.backends.pytorch.experts import Stacked

    if isinstance(listed, Stacked):
        return listed
    return Stacked(*(torch.stack(matrices) for matrices in zip(*listed.matrices, strict=True)))


@on_all
@given(seed=SEED, l=LENGTH, groups=st.integers(1, 3), parts=st.integers(1, 4), width=SIZE)
def test_ranks_that_share_a_norm_group_normalise_it_together(how, seed, l, groups, parts, width):
    """Each rank has `width` channels of every group; the mean over the ranks is the mean of the group."""
    here, shape = how(), (2, l, groups, parts, width)
    y, z = (values(how, seed + i, *shape) for i in range(2))
    w = 1 + values(how, seed, *shape[2:]) / 5
    squares = []

    def normalised(rank, mean):
        mine = [here.give(a[..., rank, :].reshape(2, l, -1)) for a in (y, z)]
        weight = small(how, w[:, rank].reshape(-1))
        y_here = here.ops.gated_rms_norm(*mine, weight, 1e-5, groups, mean=mean)
        return here.fetch(y_here).reshape(2, l, groups, width)

    for rank in range(parts):
        normalised(rank, lambda mine: squares.append(mine) or mine)
    together = [normalised(rank, lambda mine: sum(squares) / parts) for rank in range(parts)]
    flat = [a.reshape(2, l, -1) for a in (y, z)]
    expected = DEFINITION.gated_rms_norm(*flat, w.reshape(-1), 1e-5, groups).reshape(shape)
    how.near(np.stack(together, axis=3), expected, parts * width, "gated_rms_norm")


def test_a_sum_of_bfloat16_is_added_in_float32():
    """256 + 1 cannot be represented in bfloat16, and 256 + 1 + 1 can."""

    def rank(comm):
        x = torch.tensor([256.0 if comm.rank == 0 else 1.0], dtype=torch.bfloat16)
        return float(comm.all_reduce(x, (0, 1, 2)))

    assert on_each(3, rank) == [258.0] * 3

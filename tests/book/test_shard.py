"""The ranks together hold every number of a checkpoint, as often as the cut requires."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.conformance.cases import Case
from refengine.spec.arrays import DTYPES, split
from refengine.spec.config import Config, InputError
from refengine.spec.layout import Layout, obstacles, plan, span, unit
from refengine.spec.shard import CUTS, Shard, cut, held_bytes, held_tensors
from refengine.spec.tensors import table
from tests.support.layouts import LAYOUTS, Cuttable, cuttable, spelled
from tools.releases import CONFIGS

pytestmark = pytest.mark.slow

EVERY = pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
A_FEW = settings(max_examples=max(2, settings.default.max_examples // 6))
LAYOUT = st.shared(st.sampled_from(LAYOUTS), key="layout")
CASE = LAYOUT.flatmap(lambda layout: cuttable(layout, mtp_layers="*E"))


def shards(layout: Layout):
    return [Shard(layout, rank) for rank in range(layout.ranks)]


def copies(row, cfg, layout: Layout) -> np.ndarray:
    """Return by how many ranks each number of a tensor is held, along its first axis or for all of it."""
    tp, ep = layout.tp, layout.ep
    B = ep * max(1, tp // cfg.n_groups) if cfg.n_groups else 0
    conv = [np.full(width, n) for width, n in zip(cfg.conv_widths, (ep, B, B), strict=True)]
    match row.cut:
        case "whole":
            return np.array([tp * ep])
        case "kv_heads":
            return np.array([ep * max(1, tp // cfg.num_key_value_heads)])
        case "expert_rows" | "expert_columns":
            return np.array([1])
        case "x|B|C":
            return np.concatenate(conv)
        case "z|x|B|C|dt":
            return np.concatenate([conv[0], *conv, np.full(cfg.mamba_num_heads, ep)])
        case "vocab" if row.role == "embedding" and layout.pp > 1:
            return np.array([2 * ep])  # the prediction head, on the last stage, reads it too
    return np.array([ep])  # repeated by the ranks of ep


@EVERY
@A_FEW
@given(data=st.data())
def test_every_number_is_held_as_often_as_its_cut_says(layout, data):
    cfg = data.draw(cuttable(layout, mtp_layers="*E")).cfg
    assert plan(cfg, layout.tp, layout.ep, layout.pp) == layout
    held = {row.name: np.zeros(row.size, int) for row in table(cfg)}
    for shard in shards(layout):
        sizes = Counter()
        for row in held_tensors(cfg, shard):
            part = cut(row, np.arange(row.size).reshape(row.shape), cfg, shard)
            assert part.size, f"rank {shard.rank} holds nothing of {row.name}"
            held[row.name][part.ravel()] += 1
            sizes[row.role] += part.size * DTYPES[row.dtype].itemsize
        assert sizes == held_bytes(cfg, shard)
    for row in table(cfg):
        along = copies(row, cfg, layout)
        expected = np.broadcast_to(along[(...,) + (None,) * (len(row.shape) - 1)], row.shape)
        assert np.array_equal(held[row.name].reshape(row.shape), expected), row.name


@given(layout=LAYOUT, case=CASE)
def test_parts_of_a_segment_end_to_end_are_the_segment(layout, case):
    """The parts of z of all ranks make z, and so on; B and C occur once for each rank that shares them."""
    cfg, in_proj = case.cfg, next(row for row in table(case.cfg) if row.cut == "z|x|B|C|dt")
    whole, share = case.read(in_proj.name), max(1, layout.tp // cfg.n_groups)
    parts = []
    for shard in shards(Layout(layout.tp)):
        local = shard.local(cfg)
        z, xBC, dt = split(cut(in_proj, whole, cfg, shard).T, local.in_proj_widths)
        parts.append([z, *split(xBC, local.conv_widths), dt])
    z, x, B, C, dt = zip(*parts, strict=True)
    assert all(np.array_equal(part[i], part[i - i % share]) for part in (B, C) for i in range(layout.tp))
    ends = np.concatenate([part for once in (z, x, B[::share], C[::share], dt) for part in once], axis=-1)
    assert np.array_equal(ends.T, whole)


@given(size=st.integers(1, 99), blocks=st.booleans(), parts=st.integers(1, 9))
def test_parts_cover_a_width_and_differ_by_a_block_at_most(size, blocks, parts):
    size *= 16 if blocks else 1
    of = unit(size)
    spans = [span(size, parts, i, of) for i in range(parts)]
    if size // of >= parts:
        assert [i for part in spans for i in part] == list(range(size))
        assert all(len(part) % of == 0 and len(part) for part in spans)
        assert max(map(len, spans)) - min(map(len, spans)) <= of
    else:
        assert {i for part in spans for i in part} == set(range(size))


NANO, SUPER, ULTRA, SMALL = CONFIGS["nano"], CONFIGS["super"], CONFIGS["ultra"], Cuttable(mtp_layers="*E").cfg
DENSE, THREE = Case(layers="M-").cfg, Case(layers="*", attention=(6, 3)).cfg
GROUPS, NARROW = Case(n_groups=3, heads_per_group=2).cfg, Cuttable(layers="-", widths=(13, 17, 2, 61)).cfg
BLOCKS, MUTE = (Cuttable(layers="E", widths=widths).cfg for widths in ((32, 80, 2, 61), (96, 80, 2, 2)))
REFUSED = [
    (NANO, {"tp": 3}, "mamba_num_heads = 64 is not a multiple of 3", 2),
    (NANO, {"tp": 0}, "it is not a positive number", 1),
    (NANO, {"tp": 10**12}, "mamba_num_heads = 64 is not a multiple of 1000000000000", 32),
    (NANO, {"ep": 129}, "n_routed_experts = 128 is less than 129", 128),
    (NANO, {"pp": 53}, "there are 52 layers for 53 stages", 52),
    (SMALL, {"tp": 4}, "mamba_num_heads = 6 is not a multiple of 4", 2),
    (DENSE, {"ep": 2}, "n_routed_experts = 0 is less than 2", 1),
    (GROUPS, {"tp": 2}, "n_groups = 3 is neither a multiple nor a divisor of 2", 1),
    (THREE, {"tp": 2}, "num_key_value_heads = 3 is neither a multiple nor a divisor of 2", 1),
    (THREE, {"tp": 4}, "num_attention_heads = 6 is not a multiple of 4", 3),
    (NARROW, {"tp": 3}, "intermediate_size = 2 cannot be split into 3 parts", 2),
    (BLOCKS, {"tp": 3}, "moe_intermediate_size = 32 cannot be split into 3 parts of 16 or more", 2),
    (MUTE, {"tp": 3}, "vocab_size = 2 cannot be split into 3 parts", 2),
]


@pytest.mark.parametrize(("cfg", "asked", "why", "nearest"), REFUSED)
def test_an_impossible_layout_is_refused_by_name(cfg, asked, why, nearest):
    name = list(asked)[-1]
    said = f"{name} = {asked[name]} is not possible: {why}; the nearest possible: {nearest}"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        plan(cfg, **asked)
    assert plan(cfg, **asked | {name: nearest})


@pytest.mark.parametrize("cfg", [NANO, SUPER, ULTRA], ids=["nano", "super", "ultra"])
def test_the_released_models_may_be_cut_by_every_power_of_two_up_to_32(cfg: Config):
    for tp in (1, 2, 4, 8, 16, 32):
        assert not list(obstacles(cfg, tp))


def test_the_bytes_of_all_ranks_are_those_of_the_file_and_of_what_is_repeated():
    """Nano, four by two: experts occur once, the router on all ranks, a key head on two of each four."""
    cfg, whole, total = replace(NANO, layers="M*E"), Counter(), Counter()
    for row in table(cfg):
        whole[row.role] += row.size * DTYPES[row.dtype].itemsize
    for shard in shards(Layout(4, 2)):
        total += held_bytes(cfg, shard)
    inner, d = cfg.mamba_inner, cfg.hidden_size
    once = {"routed_expert": 1, "router": 8}
    twice = dict.fromkeys(("embedding", "lm_head", "mamba", "conv", "ssm", "shared_expert"), 2)
    other = {
        "norm": (2 * inner + 8 * 4 * d) / (inner + 4 * d),  # four of them are whole
        "attention": 2 * (68 + 4) / 68,
    }  # heads: 32 q, 32 o, 2 k, 2 v
    assert {role: total[role] / whole[role] for role in whole} == pytest.approx(once | twice | other)


def test_every_cut_of_the_table_is_known():
    cfg = Cuttable(mtp_layers="*E").cfg
    assert {row.cut for row in table(cfg)} == set(CUTS)

"""Every layout of up to eight ranks computes what one rank computes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refengine.conformance.cases import CUTS, agree, terms
from refengine.conformance.checks.readings import head as read_off
from refengine.conformance.truth import counted, truth
from refengine.spec.layout import Layout
from refengine.spec.numerics import tolerance
from tests.support.layouts import (
    LAYOUTS,
    Cuttable,
    by_ranks,
    cuttable,
    spelled,
    split_rows_are_the_whole,
    sums_to_the_whole,
)

pytestmark = pytest.mark.slow

EVERY = pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
A_FEW = settings(max_examples=max(2, settings.default.max_examples // 5))
LAYOUT = st.shared(st.sampled_from(LAYOUTS), key="layout")


@EVERY
@A_FEW
@given(data=st.data(), cuts=CUTS, ragged=st.booleans())
def test_shards_sum_to_the_whole(layout, data, cuts, ragged):
    """All kinds of layer, in one call or several, with rows of equal or different lengths."""
    case = data.draw(cuttable(layout))
    sums_to_the_whole(case, layout, cuts, case.lengths if ragged else None)


@pytest.mark.parametrize("layout", [of for of in LAYOUTS if of.ep > 1], ids=spelled)
@A_FEW
@given(data=st.data(), cuts=CUTS, ragged=st.booleans())
def test_ranks_that_split_the_rows_compute_the_whole(layout, data, cuts, ragged):
    case = data.draw(cuttable(layout))
    case = replace(case, batch=layout.ep + data.draw(st.integers(0, 2)))
    split_rows_are_the_whole(case, layout, cuts, case.lengths if ragged else None)


@given(layout=LAYOUT, case=LAYOUT.flatmap(lambda of: cuttable(of, mtp_layers="*E")), cuts=CUTS)
def test_the_prediction_head_on_the_last_stage_is_the_whole_one(layout, case, cuts):
    _, guesses = by_ranks(case, layout, cuts)
    size, dtype = terms(case.cfg, case.length), np.dtype(np.float64)
    for row in range(case.batch):
        (expected, margin), true = read_off(case, row), truth(case, row)
        if not counted(min(margin.min(), true.margin.min()) <= tolerance(dtype, size)):
            for mine in guesses:
                agree(mine[row], expected, dtype, size, f"row {row}", true.stretch)


def traffic(case, layout) -> dict:
    """Return, by rank, the operations of one token: (name, peers, number of elements)."""
    said = {}

    def watch(shard, words):
        said[shard.rank] = words

    by_ranks(case, layout, watch=watch)
    return said


STREAM, LATENT, GROUP = ("all_reduce", 4, 26), ("all_reduce", 4, 20), ("all_reduce", 2, 1)
SAID = [
    ("M", Layout(2), [("all_reduce", 2, 26)]),
    ("M", Layout(4), [GROUP, STREAM]),
    ("M", Layout(1, 4), []),
    ("*", Layout(4), [STREAM]),
    ("*", Layout(1, 4), []),
    ("-", Layout(4), [STREAM]),
    ("-", Layout(1, 4), []),
    ("E", Layout(4), [STREAM]),
    ("E", Layout(1, 4), [LATENT]),
    ("E", Layout(2, 2), [("all_reduce", 2, 20), ("all_reduce", 2, 26)]),
]


@pytest.mark.parametrize(("kind", "layout", "expected"), SAID)
def test_a_layer_says_what_docs_ranks_says(kind, layout, expected):
    """One sum of hidden_size values a token, of the latent width over ep; one more value for a norm group."""
    case = Cuttable(layers=kind, batch=1, length=1, heads_per_group=4, attention=(8, 2))
    for rank, words in traffic(case, layout).items():
        words = [(verb, len(peers), values) for verb, peers, values in words]
        if layout.tp > 1:
            assert words.pop(0) == ("all_reduce", layout.tp, 26), "the embedding"
            parts = [
                case.cfg.vocab_size * (i + 1) // layout.tp - case.cfg.vocab_size * i // layout.tp
                for i in range(layout.tp)
            ]
            assert words.pop() == ("all_gather", layout.tp, parts[rank % layout.tp]), "the logits"
        assert words == expected


def test_a_stage_says_one_stream():
    case = Cuttable(layers="M*E-", batch=1, length=1)
    for rank, words in traffic(case, Layout(1, 1, 4)).items():
        assert words == ([("send", (rank, rank + 1), 26)] if rank < 3 else [])

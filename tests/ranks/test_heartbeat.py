"""Signs of life: who is given up, and when."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.ranks.comm import Solo
from refengine.ranks.comm import heartbeat as signs
from refengine.ranks.comm.heartbeat import Signs, culprits
from refengine.ranks.load import speaking
from refengine.spec.layout import plan
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.ranks import sharded
from refengine.spec.shard import Shard
from tests.support.cases import Case

PATIENCE = 4.0
RANKS = range(4)


class Clock:
    """Time that a test sets."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = 100.0
        patch.setattr(signs, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def group(count: int = 4) -> list[Signs]:
    return [Signs(rank, PATIENCE) for rank in range(count)]


def tell(ranks: list[Signs], speaker: int, waits=()) -> None:
    """A rank is asked for a sign, and all others hear it."""
    if text := ranks[speaker].sign(waits):
        for other in ranks:
            if other.rank != speaker:
                other.hear(speaker, text)


def test_to_blame_is_who_waits_for_nobody():
    assert culprits([0, 2], {}) == [0, 2]
    assert culprits([0], {0: [1], 2: [0]}) == [1], "0 waits for 1 itself"
    assert culprits([0], {0: [1], 1: [3, 2]}) == [2, 3]
    assert culprits([0], {0: [1], 1: [0]}) == [0], "all wait for each other"


def test_signs_are_given_four_times_within_the_patience_of_others(clock):
    mine, given = Signs(0, PATIENCE), 0
    for _ in range(64):
        clock.now += PATIENCE / 64
        given += bool(mine.sign())
    assert given == 4


def test_who_gives_no_sign_is_given_up_after_patience_and_not_before(clock):
    mine, since = Signs(0, PATIENCE), clock.now
    clock.now += PATIENCE - 0.01
    assert mine.lost([1, 2], since) == []
    mine.hear(2, "1 0")
    clock.now += 0.02
    assert mine.lost([1, 2], since) == [1]
    clock.now += PATIENCE
    assert mine.lost([1, 2], since) == [1, 2]


def test_the_same_sign_twice_is_one(clock):
    """A store still shows the last one of a rank that is gone."""
    mine, since = Signs(0, PATIENCE), clock.now
    for _ in range(9):
        clock.now += PATIENCE / 4
        mine.hear(1, "1 0")
    assert mine.lost([1], since) == [1]


def wait(clock, ranks, chain: list[int], works: int | None, seconds: float, since: float) -> list:
    """Each of a chain waits for the next; `works` is at work, unless it is None: whom each gives up."""
    until = clock.now + seconds
    while clock.now < until:
        clock.now += PATIENCE / 16
        for rank, whom in pairwise(chain):
            tell(ranks, rank, [whom])
            if lost := ranks[rank].lost([whom], since):
                return lost
        if works is not None:
            tell(ranks, works)
    return []


@given(chain=st.permutations(RANKS))
def test_those_that_wait_for_one_that_waits_for_one_at_work_wait_on(chain):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        ranks = group()
        assert wait(clock, ranks, chain, chain[-1], 9 * PATIENCE, clock.now) == []
        assert wait(clock, ranks, chain, None, 3 * PATIENCE, clock.now) == [chain[-1]], "it stops"


@given(ring=st.permutations(RANKS))
def test_ranks_that_all_wait_for_each_other_do_not_wait_for_ever(ring):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        assert wait(clock, group(), [*ring, ring[0]], None, 3 * PATIENCE, clock.now)


def test_a_rank_gives_signs_before_every_layer():
    case, said = Case(layers="M*E-", batch=1), []
    backend = speaking(numpy_backend(np.float64), SimpleNamespace(at_work=lambda: said.append(1)))
    model = Model.build(case.cfg, case.read, backend)
    model.blocks(model.embed(case.ids), model.new_states(1))
    assert len(said) == len(case.layers) + 1, "and before the final norm"


def test_a_rank_takes_no_step_that_knows_of_no_other_ranks():
    whole = replace(numpy_backend(np.float64), step=print)
    cfg = Case(layers="M*E-").cfg
    assert sharded(whole, cfg, Shard(plan(cfg, 2, 1, 1), 0), Solo()).step is None

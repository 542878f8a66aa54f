"""Cached texts equal uncached ones, whatever shares, joins, leaves or is evicted, within the budget."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import refengine
from refengine import End, InputError
from refengine.conformance.cases import Case, cases
from refengine.conformance.truth import model
from refengine.loop import Loop
from refengine.runner import LocalRunner
from refengine.spec.layout import Layout
from refengine.spec.ops import numpy_backend
from refengine.states.prefixes import Prefixes
from tests.engine import test_loop
from tests.engine.test_loop import Letters, Plan, check
from tests.support.layouts import cuttable, spelled
from tests.support.runners import case_over_ranks

EXACT = numpy_backend(np.float64)
TREE = [30, 41]  # lengths of the two texts of which prompts are prefixes


@dataclass(frozen=True)
class Branch(Plan):
    """A plan whose prompt begins like one of two texts, for `shared` tokens."""

    text: int = 0
    shared: int = 9

    def prompt(self, case: Case) -> list[int]:
        common = case.rng(6, self.text).integers(0, case.cfg.vocab_size, TREE[self.text])
        own = case.rng(5, self.seed, self.length).integers(0, case.cfg.vocab_size, self.length)
        return [*common[: self.shared].tolist(), *own.tolist()]


BRANCHES = st.lists(
    st.builds(
        Branch,
        length=st.sampled_from((1, 2, 8)),
        max_tokens=st.integers(0, 5),
        temperature=st.sampled_from((0.0, 1.0)),
        seed=st.integers(0, 3),
        penalty=st.sampled_from((1.0, 1.3)),
        joins=st.integers(0, 9),
        leaves=st.sampled_from((99, 99, 99, 2)),
        text=st.integers(0, 1),
        shared=st.integers(0, 30),
    ),
    min_size=2,
    max_size=8,
)
BUDGETS = st.sampled_from((10**9, 10**9, 60_000, 9_000))


def played(runner, case: Case, plans: list, slots: int, chunk: int, budget: int) -> tuple[list, Loop]:
    """Return the events of each plan, run together with one cache of prefixes, and the loop."""
    loop = Loop(runner, Letters, size=slots, prefixes=Prefixes(runner, budget, lambda: Letters.stop_ids))
    events = test_loop.played(runner, case, plans, slots, chunk, loop)
    consistent(loop.prefixes)
    return events, loop


def consistent(prefixes: Prefixes) -> None:
    """Check that the tree of names has exactly the snapshots of the runner, within the budget."""
    nodes, shelf = prefixes.nodes, prefixes.runner.shelf.kept
    assert {node.name for node in nodes.values()} == set(shelf)
    assert (
        sum(node.bytes_of_keys for node in nodes.values())
        + sum(node.bytes_of_point for node in prefixes.points.values())
        == prefixes.total
        <= prefixes.budget
    )
    for node in nodes.values():
        assert node.children == sum(other.parent is node for other in nodes.values())
        assert node.parent is None or nodes[node.parent.key] is node.parent
        assert node.children or node.key in prefixes.points
    ends = sorted(prefixes.lengths.elements())
    assert ends == sorted(node.end for node in prefixes.points.values())


def agrees(case: Case, plans: list, found: list, backend, dtype) -> None:
    """Check each sequence against the same one alone, without a cache."""
    for plan, events in zip(plans, found, strict=True):
        alone = type(plan)(**{**vars(plan), "joins": 0, "leaves": 99})
        [[expected], _] = played(LocalRunner(model(case, backend)), case, [alone], 1, 512, 0)
        check(case, plan, events, expected, dtype)


TWICE = [Branch(2, 4, 0.0, 1, joins=at, text=at % 2, shared=30) for at in (0, 2, 5, 7, 9)]


@settings(max_examples=max(3, settings().max_examples // 4))
@given(
    case=cases(batch=1, length=1),
    plans=BRANCHES,
    slots=st.integers(1, 3),
    chunk=st.sampled_from((512, 5)),
    budget=BUDGETS,
)
@example(case=Case(), plans=TWICE, slots=2, chunk=5, budget=10**9)
@example(case=Case(), plans=TWICE, slots=2, chunk=5, budget=30_000)
def test_cached_is_uncached(backend, case, plans, slots, chunk, budget):
    found, _ = played(LocalRunner(model(case, backend)), case, plans, slots, chunk, budget)
    agrees(case, plans, found, backend, backend.dtype)


LAYOUTS = [Layout(2), Layout(1, 2), pytest.param(Layout(1, 1, 2), marks=pytest.mark.slow)]
LAYOUTS += [pytest.param(layout, marks=pytest.mark.thorough) for layout in (Layout(2, 2), Layout(1, 2, 2))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
@settings(max_examples=max(3, settings().max_examples // 4))
@given(
    data=st.data(), plans=BRANCHES, slots=st.integers(1, 4), chunk=st.sampled_from((512, 5)), budget=BUDGETS
)
def test_cached_is_uncached_over_ranks(layout, data, plans, slots, chunk, budget):
    case = data.draw(cuttable(layout))
    found = case_over_ranks(
        layout, case, lambda runner: played(runner, case, plans, slots, chunk, budget)[0], EXACT
    )
    agrees(case, plans, found, EXACT, np.float64)


def test_a_prompt_starts_from_the_longest_prefix_that_is_kept():
    case = Case(layers="M*")
    plans = [Branch(8, 2, 0.0, seed, joins=9 * seed, shared=30) for seed in range(3)]
    runner = LocalRunner(model(case, EXACT))
    found, loop = played(runner, case, plans, 1, 10, 10**9)
    reused = [events[-1].statistics["reused_tokens"] for events in found]
    assert reused == [0, 30, 30]  # whole chunks of 11 positions do not fit into calls of 10
    assert loop.prefixes.lengths[30] == 1, "a shared prefix is kept once"


def test_points_used_longest_ago_go_first_and_a_budget_of_nothing_keeps_nothing():
    case = Case(layers="M*")
    runner = LocalRunner(model(case, EXACT))
    plans = [Branch(2, 1, 0.0, i, joins=4 * i, shared=30, text=i % 2) for i in range(6)]
    _, loop = played(runner, case, plans, 1, 512, 10**9)
    everything, points = loop.prefixes.total, list(loop.prefixes.points.values())
    loop.prefixes.budget = everything - 1
    loop.prefixes.shrink()
    assert list(loop.prefixes.points.values()) == points[1:]
    loop.prefixes.budget = 0
    loop.prefixes.shrink()
    assert not (loop.prefixes.nodes or loop.prefixes.lengths or loop.prefixes.total or runner.shelf.kept)
    _, loop = played(LocalRunner(model(case, EXACT)), case, plans, 1, 512, 0)
    assert not loop.prefixes.nodes


def test_a_point_that_does_not_fit_is_not_kept():
    case = Case(layers="M*")
    plans = [Branch(2, 1, 0.0, i, joins=4 * i, shared=30) for i in range(3)]
    found, loop = played(LocalRunner(model(case, EXACT)), case, plans, 1, 512, 100)
    assert not loop.prefixes.nodes
    assert [events[-1].statistics["reused_tokens"] for events in found] == [0, 0, 0]


def test_a_prefix_of_a_batch_invariant_engine_has_the_same_bits_reused_or_read():
    """Snapshots are kept only at whole calls; a text of 600 tokens has one."""
    ids = np.random.default_rng(0).integers(10, 1000, 600).tolist()
    how = {"max_tokens": 4, "logprobs": 5, "temperature": 0, "ignore_eos": True}
    with refengine.load("tiny", "cpu", batch_invariant=True, cache=2**30) as engine:
        found = [list(engine.generate([*ids, 5, *more], **how)) for more in ([6], [7], [6])]
        assert [events[-1].statistics["reused_tokens"] for events in found] == [0, 512, 512]
        assert engine.loop.prefixes.lengths == {512: 1}
        assert found[0][:-1] == found[2][:-1]


def test_a_cache_is_a_number_of_bytes():
    for wrong in (-1, 1.5, "2GiB", None, True):
        with pytest.raises(InputError, match="is not a number of bytes from 0 on"):
            refengine.load("tiny", cache=wrong)


def test_ends_of_texts_are_reused():
    """A prompt that continues a reply reads only the tokens after it."""
    with refengine.load("tiny", "cpu", cache=2**30) as engine:
        ids = engine.ids("Once upon a time")
        *tokens, _ = engine.generate(ids, max_tokens=10, temperature=0, ignore_eos=True)
        longer = ids + [token.id for token in tokens] + [5, 6]
        *_, end = engine.generate(longer, max_tokens=1)
        assert isinstance(end, End) and end.statistics["reused_tokens"] == len(longer) - 3

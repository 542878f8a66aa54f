"""The experts of the CUDA backend agree with the definition, for few tokens and for many."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.backends.cuda import experts as cuda
from refengine.backends.cuda.experts import Experts, Stacked
from refengine.spec import moe
from refengine.spec.config import InputError
from refengine.spec.moe import Routing
from tests.support.cuda_device import device, needs_compiler, perturbed, sanitized  # noqa: F401
from tests.support.cuda_tiles import sizes
from tests.support.cuda_verbs import BFLOAT16, FLOAT32, exact, on_both, planted, within
from tools.cuda.emulator import EmulationError

SEED = st.integers(0, 9999)
TOKENS = st.integers(1, 8) | st.integers(9, 140)
WIDTH = st.integers(1, 40) | st.sampled_from((8, 64, 72, 136))
AROUND = st.sampled_from(((0, 0), (8, 16), (3, 1)))  # columns before and after, in a wider array
HELD = st.integers(1, 12)


class Case:
    """Tokens and experts. popular: all tokens choose the same few experts."""

    def __init__(self, build, seed, tokens, x=24, i=16, total=9, k=4, popular=False):
        self.build, self.total, k = build, total, min(k, total)
        rng = np.random.default_rng(seed)
        self.u = build.values(seed, 1, tokens, x)
        self.up = build.values(seed + 1, total, i, x, scale=x**-0.5)
        self.down = build.values(seed + 2, total, x, i, scale=i**-0.5)
        among = min(total, k + 1) if popular else total
        chosen = [rng.permutation(among)[:k] for _ in range(tokens)]
        self.expert = np.array(chosen, np.int32).reshape(1, tokens, k)
        self.weight = rng.random((1, tokens, k)).astype(np.float32)

    def run(self, device, first=0, held=None, around=(0, 0), u=None):  # noqa: F811
        part = slice(first, self.total if held is None else first + held)
        stacked = Stacked(device.from_host(self.up[part]), device.from_host(self.down[part]))
        routing = Routing(device.from_host(self.expert), device.from_host(self.weight))
        u = within(device, self.u if u is None else u, *around)
        return device.to_host(Experts(device, self.build.defines).experts(u, stacked, routing, first))

    def expected(self, first=0, held=None, down=None):
        """Return the result in float64; an expert of another rank adds nothing."""
        u, up, down, weight = exact(self.u, self.up, self.down if down is None else down, self.weight)
        here = np.arange(self.total) - first
        down[(here < 0) | (here >= (self.total if held is None else held))] = 0
        return moe.experts(u, list(zip(up, down, strict=True)), Routing(self.expert, weight))

    def check(self, device, first=0, held=None, around=(0, 0)):  # noqa: F811
        whole = self.expected(first, held, np.abs(self.down))
        y = self.run(device, first, held, around)
        self.build.near(y, self.expected(first, held), whole, products=True)


@on_both
@given(
    seed=SEED,
    tokens=TOKENS,
    x=WIDTH,
    i=WIDTH,
    total=st.sampled_from((1, 5, 9, 33)),
    k=st.integers(1, 6),
    popular=st.booleans(),
    around=AROUND,
)
@example(seed=0, tokens=3, x=300, i=272, total=40, k=22, popular=False, around=(0, 0))
@example(seed=0, tokens=9, x=264, i=136, total=5, k=4, popular=True, around=(0, 0))
@example(seed=0, tokens=70, x=72, i=264, total=2, k=2, popular=False, around=(8, 0))
def test_few_tokens_or_many_get_the_weighted_sum_of_the_definition(
    device,  # noqa: F811
    build,
    seed,
    tokens,
    x,
    i,
    total,
    k,
    popular,
    around,
):
    Case(build, seed, tokens, x, i, total, k, popular).check(device, around=around)


@on_both
@given(seed=SEED, tokens=TOKENS, cuts=st.lists(st.integers(1, 8), max_size=3))
def test_ranks_that_hold_a_range_of_the_experts_sum_to_the_whole(device, build, seed, tokens, cuts):  # noqa: F811
    case, ends = Case(build, seed, tokens), [0, *sorted(set(cuts)), 9]
    for first, end in pairwise(ends):
        case.check(device, first, end - first)


@on_both
@given(seed=SEED, tokens=st.sampled_from((4, 30, 90)), popular=st.booleans())
def test_a_token_does_not_see_its_company(device, build, seed, tokens, popular):  # noqa: F811
    """Not even if other tokens are NaN; and results do not depend on the order of threads."""
    case = Case(build, seed, tokens, popular=popular)
    whole, alone = case.run(device), np.random.default_rng(seed).random(tokens) < 0.5
    u = np.where(alone[None, :, None], case.u, np.array(np.nan, build.dtype))
    assert np.array_equal(case.run(device, u=u)[:, alone], whole[:, alone])


@given(
    seed=SEED,
    choices=st.integers(1, 90) | st.integers(900, 3300),
    total=st.integers(1, 70),
    first=st.integers(0, 30),
    rows=st.sampled_from((16, 64)),
)
def test_the_choices_are_sorted_stably_and_cut_into_tiles(device, seed, choices, total, first, rows):  # noqa: F811
    first = min(first, total - 1)
    held = max(1, total - first - 2)
    expert = np.random.default_rng(seed).integers(0, total, choices).astype(np.int32)
    arrays = Experts(device).sorted(device.from_host(expert), first, held, rows)
    order, place, tiles = map(device.to_host, arrays)
    here = np.flatnonzero((expert >= first) & (expert < first + held))
    expected = here[np.argsort(expert[here], kind="stable")]
    assert np.array_equal(order[: len(here)], expected)
    where = np.full(choices, -1)
    where[expected] = np.arange(len(here))
    assert np.array_equal(place, where)
    used = tiles[tiles[:, 2] > 0]
    covered = [p for _, start, count in used for p in range(start, start + count)]
    assert covered == list(range(len(here))) and np.array_equal(used, tiles[: len(used)])
    assert all((expert[expected[start : start + count]] == e + first).all() for e, start, count in used)
    fullest = np.bincount(expert[here] - first, minlength=held)
    assert used[:, 2].max(initial=0) <= rows and len(used) == (-(-fullest // rows)).sum()


def test_a_long_prompt_takes_turns_and_stays_the_same(device, monkeypatch):  # noqa: F811
    case = Case(BFLOAT16, 3, 50)
    whole = case.run(device)
    monkeypatch.setattr(cuda, "SPAN", 60)
    assert np.array_equal(case.run(device), whole)


@on_both
@pytest.mark.parametrize("tokens", [3, 19, 60])
def test_the_experts_are_clean_under_the_sanitizers(sanitized, build, tokens):  # noqa: F811
    Case(build, 1, tokens, 200, 40, 5, popular=tokens == 19).check(sanitized, 1, 3)
    Case(build, 1, tokens, 21, 13, 70).check(sanitized)


@on_both
def test_the_experts_bear_approximate_mathematics(perturbed, build):  # noqa: F811
    for tokens in (3, 19):
        Case(build, 1, tokens, 72, 40).check(perturbed)


FAULTS = {
    "peers share a place": ("experts_sort.cu", " + __popc(same & ((1u << threadIdx.x) - 1))", ""),
    "no wait for a stage": ("experts_grouped.cu", "copies.wait<STAGES - 2>();", ""),
    "the activation is relu": ("experts_grouped.cu", "v[0] = relu2(v[0])", "v[0] = fmaxf(v[0], 0.0f)"),
    "all slots weigh alike": ("experts_decode.cu", "weight[choice + slot] * part", "weight[choice] * part"),
    "and again": ("experts_sum.cu", "weight[choice + slot] * row[i]", "weight[choice] * row[i]"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    file, right, wrong = FAULTS[fault]
    broken = planted(tmp_path, file, right, wrong)
    with pytest.raises((AssertionError, EmulationError)):
        Case(FLOAT32, 1, 3 if "decode" in file else 30).check(broken)


@on_both
def test_the_sizes_in_python_are_those_of_the_kernels(build):
    sort, grouped, decode = (sizes(f"experts_{file}.cu", build) for file in ("sort", "grouped", "decode"))
    assert (sort["CHOICES"], sort["EXPERTS"]) == (cuda.CHOICES, cuda.EXPERTS)
    assert (decode["ROWS"], decode["WARPS"], decode["SLOTS"]) == (cuda.ROWS, cuda.WARPS, cuda.SLOTS)
    size = build.dtype.itemsize
    assert grouped["STAGES"] == cuda.STAGES[size]
    assert all(grouped[f"COLUMNS_{rows}"] == columns[size] for rows, columns in cuda.COLUMNS.items())
    padding = 0 if build.defines else 4
    assert size * (grouped["DEPTH"] + padding) == cuda.STAGE_BYTES[size]


@needs_compiler
def test_more_experts_a_token_than_a_kernel_sums_are_refused_in_a_sentence(device):  # noqa: F811
    with pytest.raises(InputError, match="at most 64 of 1024 experts a token, not 65 of 70"):
        Case(FLOAT32, 0, 2, 8, 8, total=70, k=65).run(device)

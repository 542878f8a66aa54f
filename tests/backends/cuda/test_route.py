"""The router of the CUDA backend computes in float32 for any activations; ties go to the lowest index."""

# ruff: noqa: F401, F811 (fixtures are imported, and are arguments of that name)

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.backends.cuda.layers import Layers
from refengine.conformance.cases import Case
from refengine.conformance.truth import router_margin
from refengine.spec.config import InputError
from refengine.spec.moe import route
from tests.support.cuda_device import device, needs_compiler, perturbed, sanitized
from tests.support.cuda_verbs import BFLOAT16, FLOAT32, build_for, exact, on_both, planted, small, within

SEED = st.integers(0, 9999)


def config(k, groups=1, keep=1, normalise=True, scale=2.5):
    return replace(
        Case(layers="E").cfg,
        num_experts_per_tok=k,
        n_group=groups,
        topk_group=keep,
        norm_topk_prob=normalise,
        routed_scaling_factor=scale,
    )


def routed(device, build, h, gate, bias, cfg):
    h, gate, bias = (device.from_host(a) if isinstance(a, np.ndarray) else a for a in (h, gate, bias))
    return [device.to_host(a) for a in Layers(device, build.defines).route(h, gate, bias, cfg)]


def check(device, build, seed, tokens, d, experts, cfg, around=(0, 0)):
    """Check experts in order of choice and their weights, where float32 rounding cannot change the choice."""
    h, gate = build.values(seed, 2, tokens, d), small(seed, experts, d) / np.float32(d**0.5)
    bias = small(seed, experts) / 10
    expert, weight = routed(device, build, within(device, h, *around), gate, bias, cfg)
    expected = route(*exact(h, gate, bias), cfg)
    sure = router_margin(*exact(h, gate, bias), cfg) > 1e-5
    assert sure.mean() > 0.9 and expert.dtype == np.int32 and weight.dtype == np.float32
    order, order_expected = np.argsort(expert[sure]), np.argsort(expected.expert[sure])
    chosen, chosen_expected = (np.sort(e[sure]) for e in (expert, expected.expert))
    assert np.array_equal(chosen, chosen_expected)
    weight = np.take_along_axis(weight[sure], order, -1)
    weight_expected = np.take_along_axis(expected.weight[sure], order_expected, -1)
    np.testing.assert_allclose(weight, weight_expected, rtol=1e-5, atol=1e-6)


@on_both
@given(
    seed=SEED,
    tokens=st.integers(1, 12),
    d=st.integers(1, 70) | st.sampled_from((64, 96, 200)),
    sizes=st.sampled_from(((9, 4, 1, 1), (12, 4, 3, 2), (128, 6, 1, 1), (40, 22, 1, 1), (64, 8, 8, 2))),
    normalise=st.booleans(),
    around=st.sampled_from(((0, 0), (8, 8), (1, 2))),
)
@example(seed=1, tokens=1, d=40, sizes=(512, 22, 1, 1), normalise=True, around=(0, 0))
@example(seed=2, tokens=17, d=100, sizes=(512, 22, 1, 1), normalise=True, around=(0, 0))  # tiles
@example(seed=3, tokens=17, d=64, sizes=(70, 6, 1, 1), normalise=False, around=(3, 0))
def test_the_router_chooses_and_weighs_as_the_definition(
    device, build, seed, tokens, d, sizes, normalise, around
):
    experts, k, groups, keep = sizes
    check(device, build, seed, tokens, d, experts, config(k, groups, keep, normalise), around)


@on_both
@given(k=st.integers(1, 22), repeated=st.sampled_from((1, 2, 5, 40)), tokens=st.sampled_from((1, 40)))
def test_a_tie_goes_to_the_lowest_index(device, build, k, repeated, tokens):
    """Scores depend on i // repeated, so that equal scores are equal to the last bit."""
    h, gate = np.ones((1, tokens, 3), build.dtype), np.zeros((40, 3), np.float32)
    bias = (np.arange(40) // repeated).astype(np.float32)
    expert, _ = routed(device, build, h, gate, bias, config(k))
    wanted = sorted(range(40), key=lambda i: (-(i // repeated), i))[:k]
    assert (expert == wanted).all()


def test_groups_that_tie_go_to_the_lowest_index_too(device):
    h, gate, bias = (np.zeros(s, np.float32) for s in ((1, 1, 4), (12, 4), (12,)))
    expert, _ = routed(device, FLOAT32, h, gate, bias, config(4, groups=4, keep=2))
    assert expert.ravel().tolist() == [0, 1, 2, 3]


@on_both
@pytest.mark.parametrize("tokens", [2, 40])
def test_what_is_not_a_number_gets_different_experts_and_spoils_no_other_token(device, build, tokens):
    """Padding may be NaN; the chosen indices must still be valid experts."""
    h, gate, bias = build.values(1, 1, tokens, 24), small(2, 16, 24), small(3, 16)
    alone, _ = routed(device, build, h, gate, bias, config(5))
    h[0, 1] = np.nan
    expert, weight = routed(device, build, h, gate, bias, config(5))
    assert len(set(expert[0, 1].tolist())) == 5 and expert.min() >= 0 and expert.max() < 16
    others = np.arange(tokens) != 1
    assert np.array_equal(expert[0, others], alone[0, others]) and np.isfinite(weight[0, others]).all()


@on_both
def test_experts_that_all_score_nothing_weigh_nothing(device, build):
    h, gate = np.full((1, 1, 8), 1e5, build.dtype), np.full((9, 8), -1, np.float32)
    bias = np.zeros(9, np.float32)
    _, weight = routed(device, build, h, gate, bias, config(4))
    assert not weight.any()


def test_the_router_is_clean_under_the_sanitizers(sanitized):
    build = build_for(sanitized)
    check(sanitized, build, 1, 2, 40, 24, config(4, 3, 2))
    check(sanitized, build, 2, 18, 70, 70, config(6))


def test_the_router_bears_approximate_mathematics(perturbed):
    check(perturbed, FLOAT32, 2, 3, 70, 70, config(6))


FAULTS = {
    "a tie goes to the highest index": ("v > w || (v == w && i < j)", "v > w || (v == w && i > j)"),
    "the bias weighs too": ("lane < k ? s[mine] : 0.0f", "lane < k ? c[mine] : 0.0f"),
    "a group scores its best": ("width > 1 ? best + second : best", "best"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(tmp_path, fault):
    broken = planted(tmp_path, "route.cu", *FAULTS[fault])
    with pytest.raises(AssertionError):
        check(broken, FLOAT32, 3, 16, 32, 24, config(6, 3, 1))
        test_a_tie_goes_to_the_lowest_index.hypothesis.inner_test(broken, FLOAT32, 3, 5, 1)


@needs_compiler
def test_a_gate_cut_to_bfloat16_is_seen(tmp_path):
    broken = planted(tmp_path, "router.cu", "constexpr int PIECES = 3;", "constexpr int PIECES = 1;")
    with pytest.raises(AssertionError):
        check(broken, BFLOAT16, 2, 17, 100, 64, config(6))


def test_more_experts_than_the_kernel_can_choose_are_refused_in_a_sentence(device):
    h, gate, bias = (device.zeros(s, "float32") for s in ((1, 1, 4), (64, 4), (64,)))
    with pytest.raises(InputError, match="at most 32 of 1024 experts, not 33 of 64"):
        Layers(device).route(h, gate, bias, config(33))

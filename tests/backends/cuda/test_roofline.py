"""The rooflines count the launches of the backend and the weights of the tensor table."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec.tensors import active_parameters
from tools.cuda import roofline
from tools.cuda.call import cache_bytes, state_bytes, trunk, weight_bytes
from tools.cuda.paper import CALLS, launches
from tools.cuda.work import work
from tools.releases import CONFIGS, DENSE

pytestmark = pytest.mark.slow

SIZES = st.tuples(st.integers(1, 256), st.sampled_from([1, 2, 128, 4096]), st.integers(0, 1 << 20))
COUNTED_AS = {
    "causal_conv_update": "causal_conv",
    **dict.fromkeys(["experts_count", "experts_offsets", "experts_order"], "experts_sort"),
}
LAUNCHED = {name: CONFIGS[name] for name in ("nano", "super")} | {"dense": DENSE["Nemotron-3 Nano 4B"][0]}
WHOLE = {  # kernels that go through all of their arrays
    "add",
    "causal_conv",
    "choose",
    "cuBLAS",
    "experts_sum",
    "gated_rms_norm",
    "relu2",
    "rms_norm",
    "router_few",
    "router_many",
    "ssd_outputs",
    "ssd_pass",
    "ssd_scores",
    "ssd_states",
    "ssd_step",
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_a_step_of_one_token_reads_each_weight_it_meets_once(cfg):
    held = sum(item.calls * item.held for item in work(cfg, 1, 1, 1000))
    small = weight_bytes([row for row in trunk(cfg) if row.precision == "small"])
    doubled = small // 2  # in float32 they are twice what active_parameters counts
    once = cfg.vocab_size * cfg.hidden_size * 2  # the head
    memory = 2 * state_bytes(cfg) + 1002 * cache_bytes(cfg)  # one is written before 1,001 are read
    row_of_embedding = cfg.hidden_size * 2
    weights = 2 * active_parameters(cfg) + doubled + once
    assert held == pytest.approx(weights + memory + row_of_embedding, rel=1e-7)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_the_matrices_of_a_prompt_cost_two_operations_a_weight_and_token(cfg):
    items = work(cfg, 1, 4096, 0)
    ours = "cuBLAS", "experts_up_64", "experts_down_64"
    products = [item for item in items if item.kernel in ours and item.what != "logits"]
    matrices = active_parameters(cfg) - sum(row.size for row in trunk(cfg) if row.precision == "small")
    assert sum(item.calls * item.flops for item in products) == pytest.approx(2 * 4096 * matrices, rel=1e-9)


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("cfg", LAUNCHED.values(), ids=LAUNCHED)
def test_the_backend_launches_what_the_roofline_counts(cfg, call):
    """The number of kernels agrees, and their bytes where a kernel reads all of its arrays."""
    counts, moved, expected_counts, expected = Counter(), Counter(), Counter(), Counter()
    for launch in launches(cfg, *call):
        name = COUNTED_AS.get(launch.kernel, launch.kernel)
        counts[name] += 1
        moved[name] += launch.bytes
    for item in work(cfg, *call):
        expected_counts[item.kernel] += item.calls * item.launches
        expected[item.kernel] += item.calls * item.bytes
    assert counts == expected_counts
    wrong = {
        name: (moved[name], expected[name])
        for name in WHOLE & set(moved)
        if moved[name] != pytest.approx(expected[name], rel=0.01)
    }
    assert not wrong and len(WHOLE & set(moved)) >= 6


@given(sizes=SIZES)
def test_nothing_is_expected_to_beat_its_limit(sizes):
    for device, item in product(roofline.DEVICES, work(CONFIGS["super"], *sizes)):
        assert 0 <= device.limit(item) < device.expected(item)
        assert item.held >= 0 and item.passing >= 0 and item.launches > 0


def test_the_rooflines_in_the_documentation_are_current():
    text = roofline.PAGE.read_text()
    inside = text.split(roofline.START)[1].split(roofline.END)[0]
    assert inside.strip() == roofline.tables().strip()


@pytest.mark.parametrize("batch, length, context", [(1, 1 << 22, 0), (4096, 1, 1 << 16), (64, 128, 1 << 20)])
def test_long_prompts_and_large_batches_are_grids_that_a_device_takes(batch, length, context):
    """Every launch of one layer of each kind has a grid that a device accepts."""
    cfg = replace(CONFIGS["super"], layers="M*E", mtp_layers="")
    assert len(launches(cfg, batch, length, context)) > 20

"""The tensor table has the published numbers of tensors, parameters and shapes (docs/model.md)."""

from functools import lru_cache

import pytest

from refengine.conformance.cases import Case
from refengine.spec.tensors import active_parameters, groups, parameters, placed, table
from tools.releases import CONFIGS, DENSE


@lru_cache
def rows_of(model: str):
    return table(CONFIGS[model])


def counted(rows) -> tuple[int, int, int]:
    """Return the numbers of tensors, parameters, and parameters of the prediction head."""
    return len(rows), parameters(rows), parameters(row for row in rows if row.name.startswith("mtp."))


NANO = ("nano", 6_243, 31_577_940_288, 0)
LIGHTNING = ("lightning", 6_513, 32_913_266_240, 1_335_325_952)
SUPER = ("super", 42_683, 123_611_033_088, 2_942_325_248)
ULTRA = ("ultra", 51_023, 560_524_603_904, 11_215_610_368)


@pytest.mark.parametrize(("model", "tensors", "total", "head"), [NANO, LIGHTNING, SUPER, ULTRA])
def test_the_totals_are_the_published_ones(model, tensors, total, head):
    assert counted(rows_of(model)) == (tensors, total, head)


@pytest.mark.parametrize(
    ("model", "body", "with_head", "with_embedding"),
    [
        ("nano", 2.875, 3.228, 3.580),
        ("lightning", 2.875, 3.228, 3.580),
        ("super", 11.70, 12.23, 12.77),
        ("ultra", 53.91, 54.99, 56.06),
    ],
)
def test_the_active_parameters_are_the_published_ones(model, body, with_head, with_embedding):
    """Billions that one token uses: the body; with lm_head; with the embedding too. To the digits given."""
    cfg, digits = CONFIGS[model], 3 if body < 10 else 2
    vocabulary, active = cfg.vocab_size * cfg.hidden_size, active_parameters(cfg)
    found = [round((active + i * vocabulary) / 1e9, digits) for i in range(3)]
    assert found == [body, with_head, with_embedding]


@pytest.mark.parametrize(("model", "total", "tensors"), [(name, *rest) for name, (_, *rest) in DENSE.items()])
def test_the_dense_hybrids_count_as_computed(model, total, tensors):
    assert counted(table(DENSE[model][0])) == (tensors, total, 0)


def test_only_the_router_bias_is_float32_on_disk():
    """Super's published count of F32 elements: 40 trunk layers and one of the head, 512 experts each."""
    float32 = [row for row in rows_of("super") if row.dtype == "F32"]
    assert {row.key for row in float32} == {"mixer.gate.e_score_correction_bias"}
    assert parameters(float32) == 20_992


@pytest.mark.parametrize(
    ("key", "nano", "super_", "ultra"),
    [
        ("0.mixer.in_proj.weight", (10304, 2688), (18560, 4096), (35072, 8192)),
        ("0.mixer.out_proj.weight", (2688, 4096), (4096, 8192), (8192, 16384)),
        ("0.mixer.conv1d.weight", (6144, 1, 4), (10240, 1, 4), (18432, 1, 4)),
        ("0.mixer.norm.weight", (4096,), (8192,), (16384,)),
        ("1.mixer.experts.0.up_proj.weight", (1856, 2688), (2688, 1024), (5120, 2048)),
        ("1.mixer.experts.0.down_proj.weight", (2688, 1856), (1024, 2688), (2048, 5120)),
        ("1.mixer.shared_experts.up_proj.weight", (3712, 2688), (5376, 4096), (10240, 8192)),
        ("1.mixer.shared_experts.down_proj.weight", (2688, 3712), (4096, 5376), (8192, 10240)),
        ("1.mixer.fc1_latent_proj.weight", None, (1024, 4096), (2048, 8192)),
        ("1.mixer.fc2_latent_proj.weight", None, (4096, 1024), (8192, 2048)),
        ("1.mixer.gate.weight", (128, 2688), (512, 4096), (512, 8192)),
    ],
)
def test_the_shapes_are_the_published_ones(key, nano, super_, ultra):
    """Nano's inner width is 4096, not expand x hidden = 5376 (trap 4)."""
    for model, shape in (("nano", nano), ("lightning", nano), ("super", super_), ("ultra", ultra)):
        found = {row.name: row.shape for row in rows_of(model)}
        assert found.get(f"backbone.layers.{key}") == shape


def test_the_head_has_the_published_names():
    names = {row.name: row.shape for row in rows_of("super") if row.name.startswith("mtp.")}
    assert names["mtp.layers.0.enorm.weight"] == names["mtp.layers.0.hnorm.weight"] == (4096,)
    assert names["mtp.layers.0.eh_proj.weight"] == (4096, 8192)
    assert names["mtp.layers.0.mixer.k_proj.weight"] == (256, 4096)
    assert names["mtp.layers.1.mixer.experts.511.down_proj.weight"] == (1024, 2688)
    assert names["mtp.layers.1.final_layernorm.weight"] == (4096,)


TWO = [Case(layers="MM*EM--", mtp_layers="*E"), Case(tied=True, moe_latent_size=None)]


@pytest.mark.parametrize("case", TWO)
def test_every_tensor_is_placed_once_and_no_two_share_a_name(case):
    rows = table(case.cfg)
    assert len({row.name for row in rows}) == len(rows)
    assert sum(len(group.rows) for group in groups(rows)) == len(rows)
    weights = placed(rows, lambda group: group)
    mixers = [block.pop("mixer") for block in weights.values() if "mixer" in block]
    assert sum(len(part) for part in [*weights.values(), *mixers]) == len(groups(rows))
    blocks = [f"layers.{i}" for i in range(len(case.layers))]
    blocks += [f"mtp.layers.{i}" for i in range(len(case.mtp_layers))]
    assert sorted(weights) == sorted(["", *blocks])


def test_no_two_axes_of_the_test_models_are_equal():
    """With equal axes a transposed weight would not be detected."""
    other = Case(hidden_size=28, n_groups=8, heads_per_group=1, mamba_head_dim=9, moe_latent_size=None)
    for case in (Case(), other):
        for row in table(case.cfg):
            shape = [size for size in row.shape if size > 1]
            assert len(set(shape)) == len(shape), row

"""All spellings of a config.json give one configuration; every key of a release has a stated meaning."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given

from refengine.conformance.cases import cases
from refengine.spec import keys
from refengine.spec.config import Config
from tools.releases import CONFIGS, DENSE, FILES, NANO

LIST = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
NEW_LIST = LIST | {"M": "linear_attention", "*": "full_attention"}
LAYERS = NANO["hybrid_override_pattern"]


def nano(without=(), **changes) -> Config:
    return Config.from_hf({key: value for key, value in (NANO | changes).items() if key not in without})


def test_every_key_of_a_release_is_in_exactly_one_table():
    tables = (
        keys.REQUIRED,
        keys.OPTIONAL,
        keys.FIXED,
        keys.SPELLINGS,
        keys.DERIVED,
        keys.IGNORED,
        keys.ALIASES,
        keys.SYNONYMS,
        keys.REFUSED,
    )
    counted = Counter(key for table in tables for key in table)
    assert [key for key, count in counted.items() if count > 1] == []
    for name, file in FILES.items():
        assert set(file) - set(counted) == set(), name


def test_nano_says_what_it_is():
    c = CONFIGS["nano"]
    assert (c.layers, len(c.layers), c.layers.count("*")) == (LAYERS, 52, 6)
    assert (c.mamba_inner, c.conv_dim, sum(c.in_proj_widths)) == (4096, 6144, 10304)
    assert (c.qkv_widths, c.expert_width) == ((4096, 256, 256), 2688)
    assert (c.time_step_limit, c.moe_latent_size, c.mtp_layers) == ((0.0, math.inf), None, "")
    assert (c.bos_token_id, c.eos_token_id, c.pad_token_id, c.dtype) == (1, (2,), 0, "bfloat16")


def test_the_sizes_of_a_release_are_as_published():
    """Of Super and Ultra: inner width, conv channels, rows of in_proj, rows of q and of k."""
    published = {"super": (8192, 10240, 18560, 4096, 256), "ultra": (16384, 18432, 35072, 8192, 256)}
    for name, sizes in published.items():
        c = CONFIGS[name]
        assert (c.mamba_inner, c.conv_dim, sum(c.in_proj_widths), *c.qkv_widths[:2]) == sizes
        assert c.mtp_layers == "*E"
    assert [CONFIGS["ultra"].layers.count(kind) for kind in "ME*"] == [48, 48, 12]
    assert DENSE["Nemotron-3 Nano 4B"][0].chunk_size == 256


@pytest.mark.parametrize("names", [LIST, NEW_LIST])
@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
def test_the_layers_may_be_a_list_in_either_naming(names, key):
    spelled = nano(without=["hybrid_override_pattern"], **{key: [names[kind] for kind in LAYERS]})
    assert spelled == CONFIGS["nano"]


@pytest.mark.parametrize("names", [LIST, NEW_LIST])
def test_the_layers_of_the_head_may_be_a_list_in_either_naming(names):
    as_list = nano(num_nextn_predict_layers=1, mtp_layers_block_type=[names[kind] for kind in "*E"])
    assert as_list == nano(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E")
    assert as_list.mtp_layers == "*E"
    assert nano(num_nextn_predict_layers=0, mtp_hybrid_override_pattern="*E").mtp_layers == ""


def test_a_head_that_is_applied_repeatedly_is_one_head():
    """Megatron trains Super and Ultra with two steps of one head; exporters may write the number of steps."""
    notes: list[str] = []
    assert Config.from_hf(NANO | {"num_nextn_predict_layers": 2}, notes) == nano(num_nextn_predict_layers=1)
    assert notes == ["num_nextn_predict_layers = 2: only the first prediction head is used"]


def test_a_wrapper_gives_its_text_model_and_what_holds_for_all():
    """The newer key takes precedence; keys missing in the text model come from the wrapper."""
    inner = {key: value for key, value in NANO.items() if key not in ("model_type", "eos_token_id")}
    outer = {"model_type": "nemotron_h_omni", "llm_config": inner, "eos_token_id": [2, 11], "vocab_size": 5}
    notes: list[str] = []
    assert Config.from_hf(outer, notes) == nano(eos_token_id=[2, 11])
    assert notes == ["config.json has llm_config: only the text model is loaded"]
    both = outer | {"text_config": NANO, "vision_config": {}}
    assert Config.from_hf(both) == CONFIGS["nano"]


def test_keys_that_are_not_known_leave_one_note():
    notes: list[str] = []
    assert Config.from_hf(NANO | {"shiny": 1, "null": None, "new\nline": {}}, notes) == CONFIGS["nano"]
    sentence = "config.json has keys that refengine does not know: 'shiny', 'new\\nline'; they are ignored"
    assert notes == [sentence]
    notes.clear()
    Config.from_hf(NANO | {f"key{i}": i for i in range(10)}, notes)
    assert len(notes) == 1 and "'key7' and 2 more; they are ignored" in notes[0]


@pytest.mark.parametrize("name", FILES)
def test_the_keys_of_a_release_leave_no_note(name):
    notes: list[str] = []
    assert Config.from_hf(FILES[name], notes) == CONFIGS[name] and notes == []


@pytest.mark.slow
def test_the_keys_that_transformers_writes_leave_no_note():
    transformers = pytest.importorskip("transformers")
    for theirs in (transformers.NemotronHConfig(), transformers.NemotronHConfig(num_nextn_predict_layers=1)):
        notes: list[str] = []
        Config.from_hf(json.loads(theirs.to_json_string(use_diff=False)), notes)
        assert notes == []


@pytest.mark.parametrize("key", keys.REFUSED)
def test_a_key_that_would_change_results_is_accepted_where_it_does_not(key):
    """Neutral values, null, and keys of a prediction head without a head are accepted."""
    full = key.replace("*", "size")
    notes: list[str] = []
    for value in (None, *keys.REFUSED[key]):
        assert Config.from_hf(NANO | {full: value}, notes) == CONFIGS["nano"]
        head = {"num_nextn_predict_layers": 1, full: value}
        assert Config.from_hf(NANO | head, notes) == nano(num_nextn_predict_layers=1)
    if key.startswith("mtp_"):
        assert Config.from_hf(NANO | {full: 7}, notes) == CONFIGS["nano"]
    assert notes == []


def test_the_list_wins_over_the_pattern():
    assert nano(layers_block_type=["mamba", "moe", "attention"]).layers == "ME*"


@pytest.mark.parametrize("stale", [1, 53, None])
def test_the_number_of_layers_is_that_of_the_list(stale):
    """The key may be stale, or missing."""
    assert nano(num_hidden_layers=stale) == nano(without=["num_hidden_layers"]) == CONFIGS["nano"]


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("mamba_n_groups", "n_groups", 4),
        ("mamba_d_conv", "conv_kernel", 3),
        ("mamba_chunk_size", "chunk_size", 256),
        ("mamba_dt_limit", "time_step_limit", [0.0, 0.5]),
        ("num_local_experts", "n_routed_experts", 64),
    ],
)
def test_an_older_spelling_wins(old, new, value):
    expected = tuple(value) if isinstance(value, list) else value
    assert getattr(nano(**{old: value}), new) == expected
    assert nano(without=[new], **{old: value}) == nano(**{new: value})


def test_an_older_spelling_of_what_is_ignored_is_ignored():
    assert nano(mamba_expand=3, mamba_dt_min=1, mamba_dt_max=2, mamba_dt_init_floor=0.5) == CONFIGS["nano"]
    assert nano(mamba_conv_bias=True) == CONFIGS["nano"]


@pytest.mark.parametrize(("other", "key"), keys.SYNONYMS.items())
def test_a_name_of_another_exporter_means_the_same(other, key):
    value = (NANO | {"num_nextn_predict_layers": 1, "intermediate_size": 5})[key]
    without = {k: v for k, v in NANO.items() if k != key and k not in keys.SYNONYMS}
    expected = Config.from_hf(without | {key: value})
    assert Config.from_hf(without | {other: value}) == Config.from_hf(without | {other: value, key: value})
    assert Config.from_hf(without | {other: value}) == expected


@pytest.mark.parametrize("given", [{}, {"head_dim": None}, {"attention_head_dim": None}])
def test_without_a_head_dim_the_heads_share_the_hidden_size(given):
    assert nano(without=["head_dim"], **given).head_dim == 2688 // 32
    assert nano(without=["head_dim"], attention_head_dim=128) == CONFIGS["nano"]


def test_key_value_heads_of_null_are_as_many_as_query_heads():
    """As in transformers; an absent key has no meaning, because programs differ in their default."""
    assert nano(num_key_value_heads=None).num_key_value_heads == 32
    assert nano(num_key_value_heads=None, num_query_groups=2) == CONFIGS["nano"]


@pytest.mark.parametrize("only", ["layer_norm_epsilon", "norm_eps"])
def test_either_key_gives_the_epsilon(only):
    other = {"layer_norm_epsilon", "norm_eps"} - {only}
    assert nano(without=other, **{only: 1e-6}).layer_norm_epsilon == 1e-6


@pytest.mark.parametrize("high", [math.inf, "Infinity", "inf", {"__float__": "Infinity"}])
def test_infinity_is_read_however_it_is_written(high):
    assert nano(time_step_limit=[0.0, high]) == CONFIGS["nano"]
    assert nano(time_step_limit=[{"__float__": "0.0"}, high]) == CONFIGS["nano"]
    assert nano(time_step_limit=[0.001, high]).time_step_limit == (0.001, math.inf)


def test_one_end_token_or_two():
    """Trap 10: 2 in the config, 2 and 11 at chat time."""
    assert nano(eos_token_id=[2, 11]).eos_token_id == (2, 11)
    assert nano(eos_token_id=None).eos_token_id == ()


@pytest.mark.parametrize("name", [*FILES, *DENSE])
def test_a_configuration_written_and_read_is_the_same(name):
    c = CONFIGS[name] if name in CONFIGS else DENSE[name][0]
    assert Config.from_hf(json.loads(json.dumps(c.to_hf()))) == c


@given(case=cases())
def test_any_configuration_written_and_read_is_the_same(case):
    assert Config.from_hf(json.loads(json.dumps(case.cfg.to_hf()))) == case.cfg

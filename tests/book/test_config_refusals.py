"""Impossible values are refused before any array is made, in one sentence that names the key.

In the test process the shape checks would refuse a wrong type first, which does not happen for a user. So the
refusals are produced in a process without them.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from refengine.spec.config import Config
from refengine.spec.keys import FIXED, REFUSED, REQUIRED
from tools.releases import DENSE, NANO

ROOT = Path(__file__).resolve().parents[2]
MEANT = {"head_dim", "layer_norm_epsilon"}  # a missing head_dim has a meaning; the other has a second name
NANO_NEEDS = [key for key, kinds in REQUIRED.items() if kinds != "-" and key not in MEANT]
READ = """
import json, sys
from refengine.spec.config import Config, InputError
for line in sys.stdin:
    try:
        said = "accepted: " + repr(Config.from_hf(json.loads(line)))
    except InputError as error:
        said = str(error)
    except Exception as error:
        said = "crashed: " + repr(error)
    print(json.dumps(said), flush=True)
"""


@cache
def reader():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", READ], text=True, cwd=ROOT, **pipes)


def refused(file) -> str:
    reader().stdin.write(json.dumps(file) + "\n")
    reader().stdin.flush()
    sentence = json.loads(reader().stdout.readline())
    assert not sentence.startswith(("accepted: ", "crashed: ")), sentence
    assert "\n" not in sentence
    return sentence


@pytest.fixture(scope="module", autouse=True)
def the_reader_ends_with_us():
    yield
    reader().communicate()


@pytest.mark.parametrize("key", NANO_NEEDS)
def test_a_missing_key_is_named(key):
    """No default is assumed: the class defaults of other programs belong to no released model."""
    assert key in refused({k: v for k, v in NANO.items() if k != key})
    if key != "num_key_value_heads":  # where null has a meaning
        assert key in refused(NANO | {key: None})


def test_a_head_dim_that_cannot_be_computed_is_named():
    without = {k: v for k, v in NANO.items() if k != "head_dim"}
    assert "lacks head_dim, and hidden_size = 2688 is no multiple" in refused(
        without | {"num_attention_heads": 33}
    )
    assert "num_attention_heads" in refused(without | {"num_attention_heads": "32"})
    assert "num_attention_heads" in refused(without | {"num_attention_heads": 0})


def test_a_missing_epsilon_is_named():
    assert "layer_norm_epsilon" in refused({k: v for k, v in NANO.items() if "eps" not in k})


def test_a_key_is_missing_only_for_the_layers_that_need_it():
    assert Config.from_hf({k: v for k, v in NANO.items() if k != "intermediate_size"}) == Config.from_hf(NANO)
    dense = {k: v for k, v in DENSE["Nano-9B-v2"][0].to_hf().items() if k != "intermediate_size"}
    assert "intermediate_size" in refused(dense)
    assert "mlp" in refused(dense)


def test_no_layers_at_all_are_named():
    assert "layers_block_type" in refused({k: v for k, v in NANO.items() if k != "hybrid_override_pattern"})


@pytest.mark.parametrize("key", FIXED)
def test_another_model_in_the_same_clothes_is_refused(key):
    """A gated activation, a bias, a sliding window: the same format, but not this family."""
    other = {bool: not FIXED[key], int: 2, str: "gelu"}.get(type(FIXED[key]), 4096)
    assert key in refused(NANO | {key: other})


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_would_change_results_is_refused_by_name_and_value(key):
    full = key.replace("*", "size")
    sentence = refused(NANO | {"num_nextn_predict_layers": 1, full: 7})
    assert sentence == f"{full} = 7 is not supported: it would change what the model computes"
    assert full in refused(NANO | {"num_nextn_predict_layers": 1, full: ["a", {}]})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "nemotron_h_puzzle"}, "nemotron_h_puzzle"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"attention_head_dim": 64}, "head_dim = 128 and attention_head_dim = 64"),
        ({"num_experts": 64, "num_moe_experts": 64}, "n_routed_experts = 128 and num_experts = 64"),
        ({"hybrid_override_pattern": "MEX"}, "hybrid_override_pattern"),
        ({"hybrid_override_pattern": 7}, "hybrid_override_pattern"),
        ({"layers_block_type": ["mamba", "conv"]}, "conv"),
        ({"layers_block_type": "mamba moe"}, "layers_block_type"),
        ({"hybrid_override_pattern": "M" * 5000}, "4096"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"num_nextn_predict_layers": 1.5}, "num_nextn_predict_layers"),
        ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers"),
        ({"num_nextn_predict_layers": [1]}, "num_nextn_predict_layers"),
        ({"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["other"]}, "mtp_layers_block_type"),
        ({"mamba_num_heads": 63}, "n_groups"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 128, "topk_group": 64}, "n_group"),
        ({"n_group": 4, "topk_group": 5}, "topk_group"),
        ({"n_group": 64, "topk_group": 2}, "num_experts_per_tok"),
        ({"n_group": 0}, "n_group"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -5}, "hidden_size"),
        ({"hidden_size": 2688.0}, "hidden_size"),
        ({"hidden_size": "2688"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 2**60}, "hidden_size"),
        ({"hidden_size": [1]}, "hidden_size"),
        ({"moe_latent_size": 0}, "moe_latent_size"),
        ({"moe_latent_size": 2.5}, "moe_latent_size"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor"),
        ({"layer_norm_epsilon": -1e-5, "norm_eps": -1e-5}, "layer_norm_epsilon"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"time_step_limit": [0.0]}, "time_step_limit"),
        ({"time_step_limit": [1.0, 0.5]}, "time_step_limit"),
        ({"time_step_limit": ["low", "high"]}, "time_step_limit"),
        ({"time_step_limit": {"__float__": "x"}}, "time_step_limit"),
        ({"time_step_limit": [float("nan"), 1.0]}, "time_step_limit"),
        ({"layer_norm_epsilon": [1e-5]}, "layer_norm_epsilon"),
        ({"layers_block_type": [["mamba"]]}, "layers_block_type"),
        ({"layers_block_type": 3}, "layers_block_type"),
        ({"layers_block_type": "mamba"}, "layers_block_type"),
        ({"torch_dtype": 5}, "dtype"),
    ],
)
def test_values_that_cannot_hold_are_refused_by_name(keys, named):
    assert named in refused(NANO | keys)


@pytest.mark.parametrize("file", [None, [], "nemotron_h", 3])
def test_a_file_that_is_no_object_is_refused(file):
    assert "object" in refused(file)

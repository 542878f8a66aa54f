"""The embedded model in the forms of exporters and fine-tuners generates the text of the original."""

import json
import shutil

import pytest

import refengine
from refengine.checkpoint import INDEX
from tests.support.checkpoints import alter_json, parts, rename
from tests.support.vocabularies import TINY

HOW = {"max_tokens": 10, "temperature": 0}
PROMPT = list(range(20, 60))
PAD = {"id": 2048, "content": "<|PAD_TOKEN|>", "special": True}
PAD |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def ids(model, **how) -> list[int]:
    """Return the ten likeliest tokens after a prompt."""
    with refengine.load(model, **how) as engine:
        return [event.id for event in list(engine.generate("Once upon a time", **HOW))[:-1]]


def singular(model):
    rename(model / "model.safetensors", lambda name: name.replace("embeddings.weight", "embedding.weight"))


def one_head_applied_twice(model):
    alter_json(model / "config.json", num_nextn_predict_layers=2)


def head_only_in_the_index(model):
    header, _ = parts(model / "model.safetensors")
    names = {name: "model.safetensors" for name in header if name != "__metadata__"}
    rename(model / "model.safetensors", lambda name: None if name.startswith("mtp.") else name)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def quantized_says_config(model):
    alter_json(model / "config.json", quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})


def quantized_cache(model):
    alter_json(model / "config.json", quantization_config={"kv_cache_quant_algo": "FP8"})


def another_name_of_head_dim(model):
    size = json.loads((model / "config.json").read_text())["head_dim"]
    alter_json(model / "config.json", attention_head_dim=size, head_dim=None)


def no_size_of_heads(model):
    alter_json(model / "config.json", head_dim=None)


def pad_token_beyond_the_vocabulary(model):
    tokens = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    alter_json(model / "tokenizer.json", added_tokens=[*tokens, PAD])


def wrapper_with_images(model):
    text = json.loads((model / "config.json").read_text())
    outer = {"model_type": "NemotronH_Nano_VL_V2", "llm_config": text, "vision_config": {}}
    (model / "config.json").write_text(json.dumps(outer))
    rename(model / "model.safetensors", lambda name: "language_model." + name)


def advice_with_a_trailing_comma(model):
    (model / "generation_config.json").write_text('{"temperature": 1.0,}')


DOORS = (
    singular,
    one_head_applied_twice,
    head_only_in_the_index,
    quantized_says_config,
    another_name_of_head_dim,
    no_size_of_heads,
    pad_token_beyond_the_vocabulary,
    wrapper_with_images,
    advice_with_a_trailing_comma,
)


@pytest.fixture(scope="module")
def expected():
    return ids("tiny")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_an_exporters_spelling_changes_no_token(door, expected, tmp_path):
    model = tmp_path / "m"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.md", "training.json"))
    door(model)
    assert ids(model) == expected and len(expected) == 10


def test_keys_and_values_are_stored_as_an_exporter_says(tmp_path):
    model = tmp_path / "m"
    shutil.copytree(TINY, model)
    quantized_cache(model)
    assert ids(model) == ids("tiny", kv_dtype="fp8")
    found = {}
    for name, how in {"m": {}, "fp8": {"kv_dtype": "fp8"}, "plain": {}}.items():
        with refengine.load(model if name == "m" else "tiny", **how) as engine:
            found[name] = engine.logits(PROMPT)
    assert (found["m"] == found["fp8"]).all() and (found["m"] != found["plain"]).any()

"""Whatever is wrong with a checkpoint, the user reads one sentence that names the file and what to do."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from refengine.checkpoint import INDEX, Checkpoint
from refengine.locate import locate
from refengine.untrusted import MAX_JSON
from spec.config import InputError
from tests.checkpoints import CONFIGS, add, alter, alter_json, join, parts, random_checkpoint, rename

EMBEDDING, NORM = "backbone.embeddings.weight", "backbone.norm_f.weight"


def refusal(directory) -> str:
    """The sentence with which opening is refused."""
    with pytest.raises(InputError) as refused:
        Checkpoint.open(directory)
    sentence = str(refused.value)
    assert 20 < len(sentence) < 600 and "\n" not in sentence
    return sentence


@pytest.fixture
def model(tmp_path) -> Path:
    """A good checkpoint in one file."""
    return random_checkpoint(tmp_path / "model", CONFIGS["latent"])


@pytest.fixture
def weights(model) -> Path:
    return model / "model.safetensors"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A good checkpoint in three files and an index."""
    return random_checkpoint(tmp_path / "sharded", CONFIGS["latent"], shards=3)


# THE FILE

BYTES = {
    "is empty": lambda raw: b"",
    "is too short": lambda raw: raw[:7],
    "is truncated: its header promises": lambda raw: raw[:-1],
    "the file has 100; download it again": lambda raw: raw[:100],
    "1 bytes follow its last tensor": lambda raw: raw + b"\0",
    f"its header would be {2**60} bytes": lambda raw: struct.pack("<Q", 2**60) + raw[8:],
    f"its header would be {2**64 - 1} bytes": lambda raw: b"\xff" * 8 + raw[8:],
    "is a Git LFS pointer": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "is not UTF-8 text": lambda raw: raw[:9] + b"\xff" + raw[10:],
    "is not valid JSON": lambda raw: raw[:8] + b" " + raw[9:],
    "is nested too deeply": lambda raw: join(b"[" * 100_000 + b"]" * 100_000, b""),
    "is not a JSON object": lambda raw: join([1], b""),
    "is the download complete?": lambda raw: join({}, b""),
}


@pytest.mark.parametrize("sentence", BYTES)
def test_a_damaged_file_is_refused(sentence, weights):
    weights.write_bytes(BYTES[sentence](weights.read_bytes()))
    said = refusal(weights.parent)
    assert sentence in said and str(weights.parent) in said


# THE HEADER

ENTRIES = {
    "unknown dtype 'BF17'": {"dtype": "BF17"},
    "unknown dtype ['BF16']": {"dtype": ["BF16"]},
    "the impossible shape [-1, 26]": {"shape": [-1, 26]},
    "the impossible shape [61, 26.0]": {"shape": [61, 26.0]},
    "the impossible shape [True, 26]": {"shape": [True, 26]},
    f"the impossible shape [{2**64}, 1]": {"shape": [2**64, 1]},
    "the impossible shape [1, 1": {"shape": [1] * 100_000},
    "the impossible shape '61'": {"shape": "61"},
    f"not what BF16 [{2**60}, {2**60}] takes": {"shape": [2**60, 2**60]},
    "not what BF16 [61, 25] takes": {"shape": [61, 25]},
    "not what F32 [61, 26] takes": {"dtype": "F32"},
    "the impossible data_offsets [0]": {"data_offsets": [0]},
    "the impossible data_offsets [-2, 3170]": {"data_offsets": [-2, 3170]},
    "the impossible data_offsets [3172, 0]": {"data_offsets": [3172, 0]},
    "the impossible data_offsets {}": {"data_offsets": {}},
    "an entry that is not {dtype": {"strides": [1, 61]},
    "has the shape [26, 61], where config.json calls for [61, 26]": {"shape": [26, 61]},
    "has the dtype I16, which is none of BF16": {"dtype": "I16"},
    "is quantized (NVFP4": {"dtype": "U8", "shape": [61, 52]},
}


@pytest.mark.parametrize("sentence", ENTRIES)
def test_a_header_that_lies_about_a_tensor_is_refused(sentence, weights):
    alter(weights, lambda header, data: (header | {EMBEDDING: header[EMBEDDING] | ENTRIES[sentence]}, data))
    said = refusal(weights.parent)
    assert sentence in said and (EMBEDDING in said or "quantized" in said)


@pytest.mark.parametrize("entry", [None, 5, "x", [], {}, {"dtype": "BF16"}])
def test_an_entry_that_is_none_is_refused(entry, weights):
    alter(weights, lambda header, data: (header | {EMBEDDING: entry}, data))
    assert "an entry that is not {dtype" in refusal(weights.parent)


@pytest.mark.parametrize("remarks", [5, ["pt"], {"format": 1}])
def test_metadata_that_is_not_text_is_refused(remarks, weights):
    alter(weights, lambda header, data: (header | {"__metadata__": remarks}, data))
    assert "__metadata__ that is not text" in refusal(weights.parent)


def test_tensors_may_not_overlap(weights):
    def overlap(header, data):
        first, second = [name for name in header if name.endswith("experts.0.up_proj.weight")][:2]
        return header | {second: header[second] | {"data_offsets": header[first]["data_offsets"]}}, data

    alter(weights, overlap)
    assert "overlaps another" in refusal(weights.parent)


def test_no_bytes_may_lie_between_tensors(weights):
    alter(weights, lambda header, data: ({k: v for k, v in header.items() if k != NORM}, data))
    assert "leaves a hole before it" in refusal(weights.parent)


def test_offsets_may_not_lead_beyond_the_file(weights):
    def beyond(header, data):
        last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
        begin, end = header[last]["data_offsets"]
        size = (end - begin) // 2 + 2**40
        longer = {"shape": [size], "dtype": "BF16", "data_offsets": [begin, begin + 2 * size]}
        return header | {last: longer}, data

    alter(weights, beyond)
    assert f"promises {weights.stat().st_size + 2**41} bytes" in refusal(weights.parent)


def test_a_key_may_not_come_twice(weights):
    def twice(header, data):
        return json.dumps(header).replace(NORM, EMBEDDING).encode(), data

    alter(weights, twice)
    assert f"has the key '{EMBEDDING}' twice" in refusal(weights.parent)


def test_a_number_of_ten_thousand_digits_is_refused(weights):
    def huge(header, data):
        return json.dumps(header).replace("[61, 26]", f"[{'9' * 10_000}]", 1).encode(), data

    alter(weights, huge)
    assert "is not valid JSON" in refusal(weights.parent)


def test_a_hostile_name_stays_on_one_line(weights):
    add(weights, "\ud800\n\x1b[2J" + "long" * 10_000, np.ones(2, np.float32), "F32")
    assert "\\ud800\\n\\x1b" in refusal(weights.parent)


# THE TENSORS


def test_the_first_missing_tensor_is_named_and_the_others_counted(weights):
    rename(weights, lambda name: None if ".k_proj." in name or ".experts.7." in name else name)
    said = refusal(weights.parent)
    assert "lacks the tensor backbone.layers.1.mixer.experts.7.up_proj.weight and 4 more" in said


def test_half_a_prediction_head_is_refused(tmp_path):
    random_checkpoint(tmp_path, CONFIGS["head"])
    rename(tmp_path / "model.safetensors", lambda name: None if name.startswith("mtp.layers.1") else name)
    assert "lacks the tensor mtp.layers.1.norm.weight and" in refusal(tmp_path)


def test_a_tensor_that_the_model_does_not_have_is_refused(weights):
    for name in ("backbone.layers.0.mixer.q_norm.weight", "backbone.layers.9.norm.weight"):
        add(weights, name, np.ones(26, np.float32), "F32")
    said = refusal(weights.parent)
    assert "q_norm.weight' and 1 more, which config.json has no use for" in said


def test_an_expert_may_not_come_alone_and_in_a_stack(tmp_path):
    path = random_checkpoint(tmp_path, CONFIGS["latent"], stacked=True) / "model.safetensors"
    add(path, "backbone.layers.1.mixer.experts.2.up_proj.weight", np.ones((13, 20), np.float32), "F32")
    assert "are the same tensor" in refusal(tmp_path)


def test_a_stack_of_too_few_experts_is_refused(tmp_path):
    random_checkpoint(tmp_path, CONFIGS["latent"], stacked=True)
    alter_json(tmp_path / "config.json", n_routed_experts=12)
    assert "[9, 26], where config.json calls for [12, 26]" in refusal(tmp_path)


def test_two_spellings_of_one_name_are_refused(weights):
    add(weights, "model.norm_f.weight", np.ones(26, np.float32), "F32")
    assert "are the same tensor" in refusal(weights.parent)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_2", "input_scale"])
def test_scales_of_packed_weights_are_not_ignored(name, weights):
    add(weights, f"backbone.layers.0.mixer.in_proj.{name}", np.ones((), np.float32), "F32")
    assert "is quantized (NVFP4, FP8 or another packed format): not supported yet" in refusal(weights.parent)


def test_a_quantized_model_is_refused_by_its_configuration(model):
    (model / "hf_quant_config.json").write_text("{}")
    assert "is quantized" in refusal(model)
    (model / "hf_quant_config.json").unlink()
    alter_json(model / "config.json", quantization_config={"quant_method": "modelopt"})
    assert "is quantized" in refusal(model)


# THE INDEX


def reindex(directory: Path, **changes) -> None:
    index = json.loads((directory / INDEX).read_text())
    (directory / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "a\\b.safetensors", "./x"])
def test_the_index_may_not_name_a_path(name, sharded, model):
    reindex(sharded, **{NORM: name})
    assert "a path where only a file name may be" in refusal(sharded)


@pytest.mark.parametrize("name", ["gone.safetensors", "config.json", "..", "", "\0", "\ud800"])
def test_the_index_may_name_only_weight_files_that_are_there(name, sharded):
    reindex(sharded, **{NORM: name})
    assert f"names {name!r}, which is not there: download it too" in refusal(sharded)


@pytest.mark.parametrize("text", ["[]", "{}", "5", '{"weight_map": 5}', '{"weight_map": {}}',
                                  '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["b"]}}'])  # fmt: skip
def test_an_index_without_a_map_is_refused(text, sharded):
    (sharded / INDEX).write_text(text)
    assert "has no weight_map" in refusal(sharded)


def test_an_index_that_is_not_json_is_refused(sharded):
    (sharded / INDEX).write_text("<html>404</html>")
    assert f"{INDEX} is not valid JSON" in refusal(sharded)


def test_a_tensor_must_be_where_the_index_says(sharded):
    last = max(sharded.glob("*.safetensors"))
    reindex(sharded, **{EMBEDDING: last.name})
    assert f"places '{EMBEDDING}' in {last.name}, which does not hold it" in refusal(sharded)


def test_a_missing_file_of_several_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "names 'model-00002-of-00003.safetensors', which is not there" in refusal(sharded)
    (sharded / INDEX).unlink()
    assert "is the download complete?" in refusal(sharded)


def test_the_same_tensor_in_two_files_is_refused(sharded):
    add(sharded / "model-00003-of-00003.safetensors", EMBEDDING, np.ones((61, 26), np.float32), "F32")
    said = refusal(sharded)
    assert "model-00001-of-00003.safetensors and" in said and "are the same tensor" in said


def test_one_file_beside_an_index_of_others_is_refused(sharded, weights):
    (sharded / "model.safetensors").write_bytes(weights.read_bytes())
    assert "remove the stale one" in refusal(sharded)


# THE CONFIGURATION


def test_a_configuration_that_lies_about_the_experts_costs_nothing(model):
    alter_json(model / "config.json", n_routed_experts=65536, hybrid_override_pattern="E" * 4096,
               layers_block_type=None, n_group=1, topk_group=1)  # fmt: skip
    assert "calls for more experts than the" in refusal(model)


CONFIG_TEXT = {
    "config.json is not valid JSON": b"{",
    "config.json is not a JSON object": b"[]",
    "config.json is not UTF-8 text (at byte 2)": b'{"\xe9": 1}',
    "config.json is nested too deeply": b'{"a":' * 50_000,
    "config.json has the key 'a' twice": b'{"a": 1, "a": 2}',
    "model_type 'llama' is not supported": b'{"model_type": "llama"}',
}


@pytest.mark.parametrize("sentence", CONFIG_TEXT)
def test_a_bad_configuration_is_refused(sentence, model):
    (model / "config.json").write_bytes(CONFIG_TEXT[sentence])
    said = refusal(model)
    assert sentence in said and str(model) in said


def test_a_configuration_of_absurd_size_is_not_read(model):
    os.truncate(model / "config.json", MAX_JSON + 1)
    assert "far more than it needs to be" in refusal(model)


# THE DIRECTORY


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_not_a_file_is_refused_without_waiting(name, model):
    path = model / name
    path.unlink()
    path.symlink_to(model / "nowhere")
    assert f"{path} is a link to a file that does not exist" in refusal(model)
    path.unlink()
    path.mkdir()
    assert f"{path} is a directory, where a file is expected" in refusal(model)
    path.rmdir()
    os.mkfifo(path)
    assert f"{path} is a device or pipe, where a file is expected" in refusal(model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "."])
def test_what_may_not_be_read_is_said(name, model):
    (model / name).chmod(0)
    try:
        assert "Permission denied" in refusal(model)
    finally:
        (model / name).chmod(0o700)


def test_what_the_user_calls_a_model_is_answered_in_the_users_words(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    assert f"'hf download {hub} --local-dir NVIDIA-Nemotron-3-Nano-30B-A3B-BF16'" in refusal(hub)
    assert "there is no model 'tinny'" in refusal("tinny") and "(tiny)" in refusal("tinny")
    assert "cannot read a\0b" in refusal("a\0b")
    files = {"m.gguf": "GGUF", "m.bin": "pickle", "m.safetensors": "is not a directory"}
    for name, sentence in files.items():
        Path(name).touch()
        assert sentence in refusal(name) and name in refusal(name)


def test_a_directory_without_safetensors_is_refused(tmp_path):
    assert "it has neither config.json nor *.safetensors files" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "has a config.json but no *.safetensors files" in refusal(tmp_path)
    for name, sentence in {"pytorch_model.bin": "convert it to safetensors", "m.gguf": "GGUF"}.items():
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        assert sentence in refusal(tmp_path)
        (tmp_path / name).unlink()


def test_a_directory_without_configuration_is_refused(model):
    (model / "config.json").unlink()
    assert f"{model / 'config.json'} does not exist" in refusal(model)


def test_an_embedded_model_goes_before_a_directory_of_its_name(tmp_path, monkeypatch):
    random_checkpoint(tmp_path / "tiny", CONFIGS["mamba"])
    monkeypatch.chdir(tmp_path)
    assert locate("./tiny").resolve() == tmp_path / "tiny"
    try:
        assert locate("tiny").parent.name == "models"
    except InputError as error:
        assert "models" in str(error)


def test_good_checkpoints_are_good(model, sharded):
    for directory in (model, sharded):
        assert Checkpoint.open(directory).config == CONFIGS["latent"]
    header, data = parts(model / "model.safetensors")
    assert join(header, data)[-len(data) :] == data

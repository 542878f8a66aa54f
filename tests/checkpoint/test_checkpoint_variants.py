"""Checkpoints of various exporters load with the right values; notes name contradictions and extras."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from refengine.checkpoint import INDEX, Checkpoint
from refengine.conformance.cases import Case
from refengine.spec.config import InputError
from refengine.spec.tensors import table
from tests.support.checkpoints import (
    CONFIGS,
    add,
    alter,
    alter_json,
    expected,
    join,
    parts,
    random_checkpoint,
    refusal,
    rename,
)


def test_a_prediction_head_lost_by_a_resave_is_noted(tmp_path):
    cfg = CONFIGS["head"]
    random_checkpoint(tmp_path, cfg)
    rename(tmp_path / "model.safetensors", lambda name: None if name.startswith("mtp.") else name)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.mtp_layers == "" and "prediction head" in checkpoint.notes[0]
    assert all(not name.startswith("mtp.") for name in checkpoint.stored)


def test_a_prediction_head_that_is_not_declared_is_noted(tmp_path):
    random_checkpoint(tmp_path, CONFIGS["head"])
    alter_json(tmp_path / "config.json", num_nextn_predict_layers=0)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.mtp_layers == "" and "mtp tensors" in checkpoint.notes[0]


def index_of(directory):
    """Return the weight_map of a directory, made from its files if it has none."""
    names = {name: path.name for path in sorted(directory.glob("*.safetensors")) for name in parts(path)[0]}
    names.pop("__metadata__", None)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


@pytest.mark.parametrize("shards", [1, 4])
def test_a_head_that_only_the_index_lists_is_noted(shards, tmp_path):
    """The trainer lists the head, the exporter drops its tensors."""
    random_checkpoint(tmp_path, CONFIGS["head"], shards=shards)
    index_of(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        rename(path, lambda name: None if name.startswith("mtp.") else name)
    listed, head = Checkpoint.open(tmp_path).notes
    assert listed.startswith(f"{INDEX} lists 'mtp.layers.") and "not loaded" in head


def test_a_shard_that_holds_only_the_head_may_be_absent(tmp_path):
    cfg = CONFIGS["head"]
    path = random_checkpoint(tmp_path, cfg) / "model.safetensors"
    whole = path.read_bytes()
    rename(path, lambda name: name if name.startswith("mtp.") else None)
    path.rename(tmp_path / "model-00002-of-00002.safetensors")
    path.write_bytes(whole)
    rename(path, lambda name: None if name.startswith("mtp.") else name)
    path.rename(tmp_path / "model-00001-of-00002.safetensors")
    index_of(tmp_path)
    assert Checkpoint.open(tmp_path).config == cfg and not Checkpoint.open(tmp_path).notes
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.mtp_layers == "" and len(checkpoint.notes) == 2
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "other.safetensors").touch()
    assert "names 'model-00001-of-00002.safetensors', which is not there" in refusal(tmp_path)


@pytest.mark.parametrize("declared", [0, 1, 2, 3])
@pytest.mark.parametrize("stored", [0, 1, 2])
def test_of_prediction_heads_those_that_are_there_count(declared, stored, tmp_path):
    """Layers of all heads share one numbering: mtp.layers.2 begins the second head of pattern *E."""
    cfg = CONFIGS["head"]
    path = random_checkpoint(tmp_path, cfg) / "model.safetensors"
    if stored == 2:
        header, data = parts(path)
        copies = [name for name in header if name.startswith("mtp.layers.")]
        for name in copies:
            begin, end = header[name]["data_offsets"]
            further = re.sub(r"\d+", lambda m: str(int(m[0]) + 2), name, count=1)
            offsets = [len(data), len(data) + end - begin]
            header[further] = header[name] | {"data_offsets": offsets}
            data += data[begin:end]
        path.write_bytes(join(header, data))
    if stored == 0:
        rename(path, lambda name: None if name.startswith("mtp.") else name)
    alter_json(tmp_path / "config.json", num_nextn_predict_layers=declared)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.mtp_layers == ("*E" if declared and stored else "")
    assert bool(checkpoint.notes) == ((declared, stored) not in [(0, 0), (1, 1)])
    for row in table(checkpoint.config):
        assert np.array_equal(checkpoint.read(row.name), expected(row, cfg)), row.name
    alter_json(tmp_path / "config.json", mtp_hybrid_override_pattern="*E*E", mtp_layers_block_type=None)
    if declared and stored:
        assert Checkpoint.open(tmp_path).config.mtp_layers == "*E", "a pattern that repeats"


def test_the_rows_of_both_tables_count_and_not_a_stale_vocabulary(tmp_path):
    cfg = CONFIGS["latent"]
    random_checkpoint(tmp_path, cfg)
    alter_json(tmp_path / "config.json", vocab_size=57)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == cfg
    assert checkpoint.notes == ("config.json has vocab_size = 57, the embedding 61 rows: 61 counts",)


@pytest.mark.parametrize(
    "keys", [{"head_dim": None}, {"num_key_value_heads": 3}, {"num_key_value_heads": 6}, {}]
)
@pytest.mark.parametrize("hidden", [24, 26])
def test_attention_heads_are_those_of_the_projections(hidden, keys, tmp_path):
    """Also if the hidden size is no multiple of the heads, and if no number of heads is given."""
    cfg = Case(layers="*M*", hidden_size=hidden).cfg
    random_checkpoint(tmp_path, cfg)
    text = json.loads((tmp_path / "config.json").read_text()) | keys
    text = text if keys else {key: value for key, value in text.items() if key != "num_key_value_heads"}
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert (cfg.num_attention_heads, cfg.head_dim, cfg.num_key_value_heads) == (6, 10, 2)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == cfg and "_proj " in checkpoint.notes[0] and len(checkpoint.notes) == 1


def test_neither_head_dim_nor_key_value_heads_are_needed_where_there_are_projections(tmp_path):
    cfg = CONFIGS["attention"]
    random_checkpoint(tmp_path, cfg)
    alter_json(tmp_path / "config.json", head_dim=None, num_key_value_heads=None)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == cfg and len(checkpoint.notes) == 2


@pytest.mark.parametrize("keys", [{"head_dim": 5}, {"num_attention_heads": 12}, {"head_dim": 60}])
def test_attention_heads_that_the_projections_leave_open_are_refused(keys, tmp_path):
    """Sixty rows are 6 heads of 10 or 12 of 5, so the two keys of config.json must agree."""
    random_checkpoint(tmp_path, CONFIGS["attention"])
    alter_json(tmp_path / "config.json", **keys)
    assert "where config.json calls for" in refusal(tmp_path)


@pytest.mark.parametrize(
    "heads, size, kv, given, other",
    [
        (6, 10, 2, 1, "3 heads of 20 with 1"),
        (8, 16, 4, 2, "4 heads of 32 with 2"),
        (4, 32, 2, 4, "8 heads of 16 with 4"),
        (8, 16, 4, 1, "2 heads of 64 with 1"),
        (8, 16, 4, 8, "16 heads of 8 with 8"),
    ],
)
def test_key_value_heads_with_two_readings_are_refused_with_both(heads, size, kv, given, other, tmp_path):
    """128 rows of q and 64 of k are 8 heads of 16 with 4 of keys, or 4 heads of 32 with 2 of keys."""
    sizes = {"num_attention_heads": heads, "head_dim": size, "num_key_value_heads": kv}
    random_checkpoint(tmp_path, replace(CONFIGS["attention"], **sizes))
    alter_json(tmp_path / "config.json", num_key_value_heads=given)
    said = refusal(tmp_path)
    assert f"num_key_value_heads = {given}, but q_proj has {heads * size} rows" in said
    assert f"{heads} heads of {size} with num_key_value_heads = {kv}, or {other};" in said


def test_no_number_of_key_value_heads_means_the_rows_of_k(tmp_path):
    """A null means as many as query heads, unless k_proj has fewer rows."""
    cfg = CONFIGS["attention"]
    random_checkpoint(tmp_path, cfg)
    text = json.loads((tmp_path / "config.json").read_text()) | {"num_key_value_heads": None}
    (tmp_path / "config.json").write_text(json.dumps(text))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == cfg and "k_proj has 20 rows: 2 heads" in checkpoint.notes[0]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "config, given", [("latent", None), ("latent", 5), ("latent", 26), ("experts", 7), ("experts", 10**6)]
)
def test_the_latent_of_the_experts_is_that_of_the_tensors(config, given, stacked, tmp_path):
    cfg = CONFIGS[config]
    random_checkpoint(tmp_path, cfg, stacked=stacked)
    alter_json(tmp_path / "config.json", moe_latent_size=given)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == cfg and given != cfg.moe_latent_size
    (note,) = checkpoint.notes
    assert f"moe_latent_size = {given}, the files have " in note and "projections into a latent" in note


def test_a_latent_on_which_the_tensors_do_not_agree_is_refused(tmp_path):
    path = random_checkpoint(tmp_path, CONFIGS["latent"]) / "model.safetensors"
    alter_json(tmp_path / "config.json", moe_latent_size=None)
    rename(path, lambda name: None if name.endswith("fc2_latent_proj.weight") else name)
    said = refusal(tmp_path)
    assert "fc2_latent_proj" in said
    rename(path, lambda name: None if "latent" in name else name)
    assert "experts.0.up_proj" in refusal(tmp_path)


CACHE = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
METADATA = {
    "left over": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, None, "no tensor is packed"),
    "of another program": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        None,
        "no tensor is packed",
    ),
    "the cache alone": (CACHE, None, "only the cache"),
    "the cache alone, in a file": (None, {"quantization": {"kv_cache_quant_algo": "FP8"}}, "only the cache"),
    "in a file": (None, {"quantization": {"quant_algo": "FP8"}}, "no tensor is packed"),
    "not an object": ([1], None, "no tensor is packed"),
    "a file of nothing": (None, {}, "no tensor is packed"),
    "empty": ({}, None, None),
}


@pytest.mark.parametrize("case", METADATA)
def test_plain_weights_are_read_whatever_the_metadata_says(case, tmp_path):
    cfg, (config, file, sentence) = CONFIGS["latent"], METADATA[case]
    random_checkpoint(tmp_path, cfg)
    if config is not None:
        alter_json(tmp_path / "config.json", quantization_config=config)
    if file is not None:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == cfg
    assert [sentence in note for note in checkpoint.notes] == [True] * (sentence is not None)
    (tmp_path / "hf_quant_config.json").write_text("{")
    assert Checkpoint.open(tmp_path).config == cfg


def test_tied_weights_may_be_stored_twice_if_they_are_equal(tmp_path):
    cfg = CONFIGS["tied"]
    path = random_checkpoint(tmp_path, cfg) / "model.safetensors"
    table_ = np.array(Checkpoint.open(tmp_path).read("backbone.embeddings.weight"))
    before = path.read_bytes()
    add(path, "lm_head.weight", table_, "BF16")
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).stored
    path.write_bytes(before)
    table_[-1, -1] += 1
    add(path, "lm_head.weight", table_, "BF16")
    with pytest.raises(InputError, match="lm_head"):
        Checkpoint.open(tmp_path)


def test_tensors_that_change_nothing_leave_a_note(tmp_path):
    path = random_checkpoint(tmp_path, CONFIGS["attention"]) / "model.safetensors"
    add(path, "backbone.layers.0.mixer.rotary_emb.inv_freq", np.ones(5, np.float32), "F32")
    add(path, "backbone.layers.1.mixer.k_proj.k_scale", np.ones((), np.float32), "F32")
    (note,) = Checkpoint.open(tmp_path).notes
    assert "inv_freq' and 1 more" in note


def test_several_files_need_no_index_and_strangers_are_noted(tmp_path):
    cfg = CONFIGS["dense"]
    random_checkpoint(tmp_path, cfg, shards=3)
    names = [file.path.name for file in Checkpoint.open(tmp_path).files]
    (tmp_path / "adapter.safetensors").write_bytes(b"another program's")
    assert Checkpoint.open(tmp_path).notes == ("adapter.safetensors is not part of the model: not read",)
    (tmp_path / "adapter.safetensors").unlink()
    (tmp_path / INDEX).unlink()
    assert [file.path.name for file in Checkpoint.open(tmp_path).files] == names and len(names) == 3


NAMINGS = {
    "no prefix": lambda name: name.removeprefix("backbone."),
    "under the wrapper": lambda name: "language_model." + name,
    "under the wrapper of another program": lambda name: (
        "model.language_model." + name.removeprefix("backbone.")
    ),
    "the head outside the wrapper": lambda name: (
        name if name[:3] in ("lm_", "mtp") else f"language_model.{name}"
    ),
    "by a compiled or distributed trainer": lambda name: "_orig_mod.module." + name,
    "a prefix for everything": lambda name: "model." + name.removeprefix("backbone."),
    "embedding in the singular": lambda name: name.replace("embeddings.weight", "embedding.weight"),
    "embedding as in most models": lambda name: name.replace("embeddings.weight", "embed_tokens.weight"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_tensors_of_every_exporter_are_found(naming, tmp_path):
    cfg = CONFIGS["head"]
    rename(random_checkpoint(tmp_path, cfg) / "model.safetensors", NAMINGS[naming])
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == cfg and not checkpoint.notes
    for row in table(cfg):
        assert np.array_equal(checkpoint.read(row.name), expected(row, cfg)), row.name


def test_stacked_experts_and_convolutions_as_mlx_saves_them(tmp_path):
    cfg = CONFIGS["latent"]
    path = random_checkpoint(tmp_path, cfg, stacked=True) / "model.safetensors"
    rename(path, lambda name: re.sub(r"experts\.(up|down)_proj$", lambda m: MLX[m[1]], name))

    def transposed(header, data):  # [c 1 k] -> [c k 1]
        for name, entry in header.items():
            if name.endswith("conv1d.weight"):
                c, one, k = entry["shape"]
                header[name] = entry | {"shape": [c, k, one]}
        return header, data

    alter(path, transposed)
    checkpoint = Checkpoint.open(tmp_path)
    assert any("switch_mlp" in name for name in checkpoint.files[0].tensors)
    for row in table(cfg):
        assert np.array_equal(checkpoint.read(row.name), expected(row, cfg)), row.name


MLX = {"up": "switch_mlp.fc1.weight", "down": "switch_mlp.fc2.weight"}


def test_a_prefix_that_is_not_known_is_named(tmp_path):
    path = random_checkpoint(tmp_path, CONFIGS["latent"]) / "model.safetensors"
    rename(path, lambda name: name.replace("backbone.", "encoder.trunk."))
    assert "have the prefix 'encoder.trunk.', which is none of backbone., model." in refusal(tmp_path)


def wrapped(directory, cfg, key, **outer):
    """Return a wrapper with images and sound around a text model, as released or as transformers saves it."""
    path = random_checkpoint(directory, cfg) / "model.safetensors"
    rename(path, lambda name: "language_model." + name)
    for name in ("vision_model.radio_model.model.blocks.0.norm1.weight", "mlp1.0.weight", "mlp1.1.weight"):
        add(path, name, np.ones(8, np.float32), "F32")
    add(path, "sound_encoder.encoder.layers.0.norm_out.weight", np.ones(8, np.uint8), "U8")
    text = json.loads((directory / "config.json").read_text())
    config = {
        "model_type": "NemotronH_Nano_VL_V2",
        key: text,
        "vision_config": {},
        "img_context_token_id": 18,
    }
    (directory / "config.json").write_text(json.dumps(config | outer))
    return directory


@pytest.mark.parametrize("key", ["llm_config", "text_config"])
def test_the_text_model_of_a_wrapper_is_read(key, tmp_path):
    """Other parts may be packed; this does not affect the text model."""
    cfg = CONFIGS["head"]
    checkpoint = Checkpoint.open(wrapped(tmp_path, cfg, key, sound_config={}))
    assert checkpoint.config == cfg
    config, tensors = checkpoint.notes
    assert (
        config
        == f"config.json has {key} beside 'sound_config', 'vision_config': only the text model is loaded"
    )
    for part in ("2 of 'mlp1'", "1 of 'vision_model'", "1 of 'sound_encoder'"):
        assert part in tensors
    for row in table(cfg):
        assert np.array_equal(checkpoint.read(row.name), expected(row, cfg)), row.name


def test_the_text_model_needs_no_shard_of_the_other_parts(tmp_path):
    wrapped(tmp_path, CONFIGS["latent"], "llm_config")
    index_of(tmp_path)
    path = tmp_path / "model.safetensors"
    rename(path, lambda name: name if name.startswith("language_model.") else None)
    assert any("lists" in note for note in Checkpoint.open(tmp_path).notes)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    index = {k: v if k.startswith("language_model.") else "gone.safetensors" for k, v in index.items()}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    assert Checkpoint.open(tmp_path).config == CONFIGS["latent"]
    text = json.loads((tmp_path / "config.json").read_text())["llm_config"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert Checkpoint.open(tmp_path).config == CONFIGS["latent"], "its configuration taken out of the wrapper"


def test_a_tensor_of_the_text_model_that_is_not_known_is_refused_in_a_wrapper_too(tmp_path):
    path = wrapped(tmp_path, CONFIGS["latent"], "llm_config") / "model.safetensors"
    name = "language_model.backbone.layers.0.mixer.q_norm.weight"
    add(path, name, np.ones(26, np.float32), "F32")
    assert f"{name!r}, which the model of config.json does not have" in refusal(tmp_path)


def test_a_wrapper_of_another_text_model_is_refused(tmp_path):
    wrapped(tmp_path, CONFIGS["latent"], "llm_config", text_config={"model_type": "llama"})
    assert "model_type 'llama' is not supported" in refusal(tmp_path)


def test_links_to_files_elsewhere_are_followed(tmp_path):
    """The download cache of the Hugging Face hub consists of such links."""
    stored = random_checkpoint(tmp_path / "blobs", CONFIGS["mamba"])
    (tmp_path / "snapshot").mkdir()
    for path in stored.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert Checkpoint.open(tmp_path / "snapshot").digest() == Checkpoint.open(stored).digest()

"""Checkpoints as they are met: re-saved, with strangers, with links. What is not read is noted."""

import re

import numpy as np
import pytest

from refengine.checkpoint import INDEX, Checkpoint
from refengine.spec.config import InputError
from refengine.spec.tensors import table
from tests.support.checkpoints import (
    CONFIGS,
    add,
    alter,
    alter_json,
    expected,
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


def test_links_to_files_elsewhere_are_followed(tmp_path):
    """The download cache of the Hugging Face hub is made of them."""
    stored = random_checkpoint(tmp_path / "blobs", CONFIGS["mamba"])
    (tmp_path / "snapshot").mkdir()
    for path in stored.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert Checkpoint.open(tmp_path / "snapshot").fingerprint() == Checkpoint.open(stored).fingerprint()

"""Checkpoints as they are met: re-saved, with strangers, with links. What is not read is noted."""

import numpy as np
import pytest

from refengine.checkpoint import INDEX, Checkpoint
from refengine.spec.config import InputError
from tests.support.checkpoints import CONFIGS, add, alter_json, random_checkpoint, rename


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


def test_links_to_files_elsewhere_are_followed(tmp_path):
    """The download cache of the Hugging Face hub is made of them."""
    stored = random_checkpoint(tmp_path / "blobs", CONFIGS["mamba"])
    (tmp_path / "snapshot").mkdir()
    for path in stored.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert Checkpoint.open(tmp_path / "snapshot").fingerprint() == Checkpoint.open(stored).fingerprint()

"""Paths that are no checkpoints are refused in one sentence: directories, links, pipes, names, formats."""

import os
from pathlib import Path

import pytest

from refengine.checkpoint.locate import locate
from refengine.spec.config import InputError
from refengine.untrusted import MAX_JSON
from tests.support.checkpoints import CONFIGS, alter_json, random_checkpoint, refusal


@pytest.fixture
def model(tmp_path) -> Path:
    """Return a good checkpoint in one file."""
    return random_checkpoint(tmp_path / "model", CONFIGS["latent"])


def test_a_configuration_that_lies_about_the_experts_costs_nothing(model):
    alter_json(
        model / "config.json",
        n_routed_experts=65536,
        hybrid_override_pattern="E" * 4096,
        layers_block_type=None,
        n_group=1,
        topk_group=1,
    )
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
    assert f"'hf download {hub}', then give {hub} again" in refusal(hub)
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

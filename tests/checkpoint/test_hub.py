"""A model in the local Hugging Face cache is found by its name, or by its folder in the cache."""

import os
import shutil

import pytest

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.hub import cache_directory, models
from refengine.spec.config import InputError
from tests.support.vocabularies import TINY

NAME = "nvidia/a-model"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder of a model in a cache with two snapshots; main is the first."""
    for variable in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "models--nvidia--a-model"
    for commit in ("aaa", "bbb"):
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / commit).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copy(TINY / file, folder / "blobs" / (commit + file))
            os.symlink(f"../../blobs/{commit}{file}", folder / "snapshots" / commit / file)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa")
    (folder / "refs" / "v2").write_text("bbb")
    for ref in ("refs/pr/1", "feature/x"):
        (folder / "refs" / ref).parent.mkdir(parents=True)
        (folder / "refs" / ref).write_text("bbb")
    return folder


def test_a_name_is_looked_up_in_the_cache(folder):
    assert Checkpoint.open(NAME).directory == folder / "snapshots" / "aaa"
    assert Checkpoint.open(f"{NAME}@v2").directory == folder / "snapshots" / "bbb"
    assert Checkpoint.open(f"{NAME}@bbb").directory == folder / "snapshots" / "bbb"


@pytest.mark.parametrize("revision", ["refs/pr/1", "feature/x"])
def test_a_revision_may_be_a_pull_request_or_a_branch_with_a_slash(folder, revision):
    assert Checkpoint.open(f"{NAME}@{revision}").directory == folder / "snapshots" / "bbb"


def test_a_revision_that_is_not_there_names_those_that_are_and_the_command(folder):
    says = "no revision refs/pr/2 of nvidia/a-model, but feature/x, main, refs/pr/1, v2; .*"
    says += "'hf download nvidia/a-model --revision refs/pr/2'"
    with pytest.raises(InputError, match=says):
        Checkpoint.open(f"{NAME}@refs/pr/2")
    assert models() == [NAME]


def test_no_name_leads_out_of_the_cache(folder, tmp_path):
    shutil.copytree(TINY, tmp_path / "secret")
    (folder / "refs" / "bad").write_text("../../../../secret")
    for name in (f"{NAME}@bad", f"{NAME}@../../../../secret", f"{NAME}@refs/../main", f"{NAME}@/main"):
        with pytest.raises(InputError):
            Checkpoint.open(name)


def test_a_folder_of_the_cache_is_a_model(folder):
    assert Checkpoint.open(folder).directory == folder / "snapshots" / "aaa"
    (folder / "refs" / "main").unlink()
    os.utime(folder / "snapshots" / "aaa", (1, 1))
    assert Checkpoint.open(folder).directory == folder / "snapshots" / "bbb"


def test_a_directory_goes_before_the_cache(folder, tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert str(Checkpoint.open(NAME).directory) == NAME


@pytest.mark.parametrize("name", ["nvidia/another", f"{NAME}@v3", "nvidia/..", "../nvidia"])
def test_a_model_that_is_not_in_the_cache_is_one_sentence(folder, name):
    with pytest.raises(InputError) as error:
        Checkpoint.open(name)
    assert "\n" not in str(error.value)


def test_the_cache_is_where_huggingface_hub_has_it(folder, tmp_path, monkeypatch):
    assert cache_directory() == tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert cache_directory() == tmp_path / "elsewhere"
    with pytest.raises(
        InputError, match=r"no model of this name in .*elsewhere; .*'hf download nvidia/a-model'"
    ):
        Checkpoint.open(NAME)
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache" / "huggingface" / "hub"

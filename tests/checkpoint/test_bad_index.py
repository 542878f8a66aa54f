"""An index of several files is used only if it is true, and never leads out of its directory."""

import json
from pathlib import Path

import numpy as np
import pytest

from refengine.checkpoint import INDEX, Checkpoint
from tests.support.checkpoints import CONFIGS, add, random_checkpoint, refusal

EMBEDDING, NORM = "backbone.embeddings.weight", "backbone.norm_f.weight"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Return a good checkpoint in three files and an index."""
    return random_checkpoint(tmp_path / "sharded", CONFIGS["latent"], shards=3)


def reindex(directory: Path, **changes) -> None:
    index = json.loads((directory / INDEX).read_text())
    (directory / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))


@pytest.mark.parametrize("name", ["../sharded/model.safetensors", "/etc/passwd", "a\\b.safetensors", "./x"])
def test_the_index_may_not_name_a_path(name, sharded):
    reindex(sharded, **{NORM: name})
    assert "a path where only a file name may be" in refusal(sharded)


@pytest.mark.parametrize("name", ["gone.safetensors", "config.json", "..", "", "\0", "\ud800"])
def test_the_index_may_name_only_weight_files_that_are_there(name, sharded):
    reindex(sharded, **{NORM: name})
    assert f"names {name!r}, which is not there: download it too" in refusal(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "5",
        '{"weight_map": 5}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["b"]}}',
    ],
)
def test_an_index_without_a_map_is_refused(text, sharded):
    (sharded / INDEX).write_text(text)
    assert "has no weight_map" in refusal(sharded)


def test_an_index_that_is_not_json_is_refused(sharded):
    (sharded / INDEX).write_text("<html>404</html>")
    assert f"{INDEX} is not valid JSON" in refusal(sharded)


def test_a_tensor_must_be_where_the_index_says(sharded):
    last = max(sharded.glob("*.safetensors"))
    reindex(sharded, **{EMBEDDING: last.name})
    assert f"places '{EMBEDDING}' in {last.name}, which does not contain it" in refusal(sharded)


def test_a_missing_file_of_several_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "names 'model-00002-of-00003.safetensors', which is not there" in refusal(sharded)
    (sharded / INDEX).unlink()
    assert "is the download complete?" in refusal(sharded)


@pytest.mark.parametrize("name", [EMBEDDING, "model.embedding.weight"])
def test_of_two_tensors_of_one_name_the_one_that_the_index_names_counts(name, sharded):
    last = sharded / "model-00003-of-00003.safetensors"
    add(last, name, np.ones((61, 26), np.float32), "F32")
    checkpoint = Checkpoint.open(sharded)
    (note,) = checkpoint.notes
    assert note.startswith(f"{last.name} holds another {name!r}")
    assert checkpoint.stored[EMBEDDING].file.path.name == "model-00001-of-00003.safetensors"
    if name == EMBEDDING:
        reindex(sharded, **{EMBEDDING: last.name})
        assert (Checkpoint.open(sharded).read(EMBEDDING) == 1).all()


def test_the_same_tensor_in_two_files_without_an_index_is_refused(sharded):
    add(sharded / "model-00003-of-00003.safetensors", EMBEDDING, np.ones((61, 26), np.float32), "F32")
    (sharded / INDEX).unlink()
    said = refusal(sharded)
    assert "model-00001-of-00003.safetensors and" in said and "name the same tensor" in said


def test_two_tensors_that_the_index_both_names_are_refused(sharded):
    last = "model-00003-of-00003.safetensors"
    add(sharded / last, "model.embedding.weight", np.ones((61, 26), np.float32), "F32")
    reindex(sharded, **{"model.embedding.weight": last})
    assert "name the same tensor" in refusal(sharded)


def test_one_file_beside_an_index_of_others_is_refused(sharded):
    (sharded / "model.safetensors").touch()
    assert "remove the outdated one" in refusal(sharded)

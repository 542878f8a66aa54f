"""Prefixes in a directory serve later processes, whatever other files it has, and keep the budget."""

import os
import shutil

import pytest

import refengine
from refengine import InputError
from refengine.states.state import State
from tests.engine.test_cli import cli, fails  # noqa: F401

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": f"Question {i}: tell me a long story about it."} for i in range(6)]
HOW = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


def told(folder, count: int, backend: str = "numpy", cache: int = 2**30) -> list[tuple[list[int], int]]:
    """Return (new tokens, reused tokens) of prompts that continue each other, by a new engine."""
    found = []
    with refengine.load("tiny", backend, "float32", cache=cache, cache_dir=folder) as engine:
        for i in range(1, count + 1):
            *tokens, end = engine.generate(MESSAGES[:i], **HOW)
            found.append(([token.id for token in tokens], end.statistics["reused_tokens"]))
        assert engine.disk.trouble == ""
    return found


@pytest.fixture(scope="module")
def plain():
    with refengine.load("tiny", "numpy") as engine:
        texts = [list(engine.generate(MESSAGES[:i], **HOW)) for i in range(1, 4)]
    return [[token.id for token in text[:-1]] for text in texts]


def test_a_later_process_starts_from_the_prefixes_of_one_before(tmp_path, plain):
    first = told(tmp_path, 2)
    again = told(tmp_path, 3, "cpu")
    assert [ids for ids, _ in first] == plain[:2] and [ids for ids, _ in again] == plain
    assert first[0][1] == 0 < first[1][1] and len(os.listdir(tmp_path)) == 3
    assert again[0][1] == first[1][1] < again[1][1] == again[2][1]


def test_rubbish_in_the_directory_is_left_alone_and_damaged_files_are_removed(tmp_path, plain):
    told(tmp_path, 1)
    [name] = os.listdir(tmp_path)
    raw = (tmp_path / name).read_bytes()
    other = name.replace("-v1-", "-v2-")
    (tmp_path / other).write_bytes(raw)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder.state").mkdir()
    for damage in (raw[:-1], b"", raw[:5000] + bytes(512) + raw[5512:], os.urandom(9999)):
        (tmp_path / name).write_bytes(damage)
        assert [ids for ids, _ in told(tmp_path, 2)] == plain[:2]
        State.load(tmp_path / name)
    (tmp_path / name).unlink()
    shutil.copy(tmp_path / other, tmp_path / name)
    assert told(tmp_path, 2)[1][1] > 0
    assert {other, "notes.txt", "folder.state"} <= set(os.listdir(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_of_other_tokens_under_the_name_is_not_used(tmp_path, plain):
    told(tmp_path, 2)
    one, two = sorted(os.listdir(tmp_path), key=lambda name: os.stat(tmp_path / name).st_size)
    shutil.copy(tmp_path / two, tmp_path / one)
    assert [ids for ids, _ in told(tmp_path, 2)] == plain[:2]


def test_the_files_used_longest_ago_go_over_the_budget(tmp_path):
    told(tmp_path, 4)
    sizes = {name: os.stat(tmp_path / name).st_size for name in os.listdir(tmp_path)}
    assert len(sizes) == 4
    told(tmp_path, 6, cache=sum(sizes.values()))
    left = set(os.listdir(tmp_path))
    assert sum(os.stat(tmp_path / name).st_size for name in left) <= sum(sizes.values())
    assert min(sizes, key=sizes.__getitem__) not in left


def test_a_directory_that_cannot_be_is_a_sentence(tmp_path, cli):  # noqa: F811
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file cannot be a cache"):
        refengine.load("tiny", cache=2**30, cache_dir=tmp_path / "file")
    with pytest.raises(InputError, match="cache_dir needs a number of bytes"):
        refengine.load("tiny", cache_dir=tmp_path)
    assert "cannot be a cache" in fails(cli("chat", "x", "--cache-dir", tmp_path / "file"))


def test_a_directory_that_vanishes_is_a_note_and_stops_no_text(tmp_path, plain):
    folder = tmp_path / "cache"
    with refengine.load("tiny", "numpy", cache=2**30, cache_dir=folder) as engine:
        shutil.rmtree(folder)
        ids = [token.id for token in list(engine.generate(MESSAGES[:1], **HOW))[:-1]]
        assert ids == plain[0] and "cannot be saved" in engine.disk.trouble


def test_a_file_of_other_shapes_is_not_used(tmp_path, plain):
    told(tmp_path, 1)
    [name] = os.listdir(tmp_path)
    state = State.load(tmp_path / name)
    arrays = {key: a[..., :1] for key, a in state.arrays.items()}
    State(state.model, state.ids, state.position, arrays).save(tmp_path / name)
    assert [ids for ids, _ in told(tmp_path, 2)] == plain[:2]
    assert State.load(tmp_path / name).arrays["layers.0.S"].shape == state.arrays["layers.0.S"].shape

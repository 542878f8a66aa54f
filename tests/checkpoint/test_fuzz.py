"""A damaged file is opened or refused in one line: no traceback, no wait, no memory.

A good checkpoint is damaged in a few places, the same in each run, and new ones with `--hunt`; Hypothesis
shrinks failures. If a file is accepted, all of it can be read, and `safetensors` accepts it too.
"""

from __future__ import annotations

import json
import shutil
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from refengine.checkpoint import INDEX, Checkpoint
from refengine.checkpoint.safetensors_file import SafetensorsFile
from refengine.conformance.cases import Case
from refengine.spec.config import InputError
from tests.support.checkpoints import join, parts, random_checkpoint
from tests.support.tries import tries

resource = pytest.importorskip("resource")
CFG = Case(layers="ME*", mtp_layers="-", n_routed_experts=4).cfg
MEMORY = 256 * 2**20  # bytes that all of it together may take
SECONDS = 10  # of a processor, that one file may take

TOKENS = [b"0", b"-", b"e9", b"9" * 30, b'"', b"\\", b"{", b"[", b"}", b"]", b",", b"[[", b"null", b"\0" * 8]
ASCII = st.from_regex(rb"[ -~]{1,8}", fullmatch=True)
PIECES = st.sampled_from(TOKENS) | ASCII | st.binary(min_size=1, max_size=8)
WHERE = st.integers(0, 2**30)
EDIT = st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), WHERE, PIECES)
EDITS = st.lists(EDIT, min_size=1, max_size=4)

NUMBERS = [0, 1, -1, 2, 61, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")]
TEXTS = ["", "x", "0", "BF16", "F4", "U8", "\ud800", "a\nb", "../x", "/etc/passwd", "M*E-", "*" * 99, "mamba"]
PLAIN = st.sampled_from([None, True, False] + NUMBERS + TEXTS)
OBJECTS = partial(st.dictionaries, st.sampled_from("ab"), max_size=2)
VALUES = PLAIN | st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | OBJECTS(inner))
CHANGE = st.tuples(st.sampled_from(["set", "rename", "delete", "nest", "swap"]), WHERE, VALUES)
CHANGES = st.lists(CHANGE, min_size=1, max_size=3)


def edited(raw: bytes, edits, start: int = 0) -> bytes:
    """Return bytes after a few edits at or beyond `start`."""
    for kind, where, piece in edits:
        at = start + where % max(1, len(raw) - start)
        size = len(piece)
        match kind:
            case "set":
                raw = raw[:at] + piece + raw[at + size :]
            case "insert":
                raw = raw[:at] + piece + raw[at:]
            case "delete":
                raw = raw[:at] + raw[at + size :]
            case "cut":
                raw = raw[:at]
    return raw


def changed(value, changes):
    """Return a JSON value after a few changes, each at one of its inner places."""
    value, changes = deepcopy((value, changes))
    for kind, where, new in changes:
        inner = places(value)
        if not inner:
            return new
        holder, key = inner[where % len(inner)]
        match kind:
            case "set":
                holder[key] = new
            case "nest":
                holder[key] = [holder[key]]
            case "delete":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[str(new)[:50]] = holder.pop(key)
            case "swap":
                other, name = inner[(where // len(inner)) % len(inner)]
                holder[key], other[name] = other[name], holder[key]
    return value


def places(value) -> list[tuple]:
    """Return every (holder, key) below a JSON value."""
    found, todo = [], [value]
    while todo:
        holder = todo.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            found += [(holder, key) for key in keys]
            todo += [holder[key] for key in keys]
    return found


def works_or_is_refused(directory: Path) -> None:
    began = time.process_time()
    try:
        with Checkpoint.open(directory) as checkpoint:
            for name in checkpoint.stored:
                checkpoint.read(name)
            checkpoint.digest()
    except InputError as refused:
        sentence = str(refused)
        assert 10 < len(sentence) < 1000 and sentence.splitlines() == [sentence]
    assert time.process_time() - began < SECONDS


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """Limit memory to MEMORY more than now: a larger allocation fails, with another error than InputError."""
    statm, limits = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Return a directory with a good checkpoint in one file; tests damage copies of it."""
    return random_checkpoint(tmp_path_factory.mktemp("one"), CFG)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("many"), CFG, shards=3, stacked=True, prefix="model.")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of a checkpoint with its file `name` replaced, in the same place each time."""
    place = tmp_path_factory.mktemp("damaged")

    def damaged(good: Path, name: str, raw: bytes) -> Path:
        if not (place / good.name).exists():
            shutil.copytree(good, place / good.name)
        directory = place / good.name
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(raw)
        return directory

    yield damaged
    shutil.rmtree(place)


def agrees_with_the_library(path: Path) -> None:
    """Check that `safetensors` accepts a file that we accept; it may accept more."""
    try:
        ours = SafetensorsFile(path)
    except InputError:
        return
    try:
        with safe_open(path, framework="np") as theirs:
            assert set(theirs.keys()) == set(ours.tensors)
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses what we accept: {error}") from None
    finally:
        ours.close()


@tries(840, 105)
@given(edits=EDITS)
def test_a_file_with_wrong_bytes(edits, one, copy):
    raw = (one / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(raw[:8], "little")
    directory = copy(one, "model.safetensors", edited(raw[:header_end], edits) + raw[header_end:])
    works_or_is_refused(directory)
    agrees_with_the_library(directory / "model.safetensors")


@tries(360, 45)
@given(edits=EDITS)
def test_a_file_with_wrong_data(edits, one, copy):
    raw = (one / "model.safetensors").read_bytes()
    header_end = 8 + int.from_bytes(raw[:8], "little")
    directory = copy(one, "model.safetensors", edited(raw, edits, start=header_end))
    works_or_is_refused(directory)
    agrees_with_the_library(directory / "model.safetensors")


@tries(840, 105)
@given(changes=CHANGES)
def test_a_file_whose_header_says_something_else(changes, one, copy):
    header, data = parts(one / "model.safetensors")
    directory = copy(one, "model.safetensors", join(changed(header, changes), data))
    works_or_is_refused(directory)
    agrees_with_the_library(directory / "model.safetensors")


@tries(480, 60)
@given(changes=CHANGES)
def test_an_index_that_says_something_else(changes, many, copy):
    index = changed(json.loads((many / INDEX).read_text()), changes)
    works_or_is_refused(copy(many, INDEX, json.dumps(index).encode()))


@tries(840, 105)
@given(changes=CHANGES)
def test_a_configuration_that_says_something_else(changes, one, copy):
    config = changed(json.loads((one / "config.json").read_text()), changes)
    works_or_is_refused(copy(one, "config.json", json.dumps(config).encode()))

"""A damaged GGUF file is read, or refused in one line: no traceback, no wait, no memory."""

from __future__ import annotations

import warnings
from copy import deepcopy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.gguf import config
from refengine.conformance.cases import Case
from refengine.spec.config import InputError
from refengine.text.chat_template import ChatTemplate
from refengine.text.ids_only import tokenizer_of
from tests.checkpoint.test_fuzz import EDITS, edited, little_memory  # noqa: F401  (a fixture)
from tests.support.gguf import gguf_bytes, parts
from tests.support.tries import thorough, tries

CFG = Case().cfg
GOOD = Path(__file__).parent / "gguf" / "experts-nvfp4.gguf"
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 8, 31, 64, 255, 2**16, 2**31 - 1, 0.5, float("nan"), float("inf")])
LISTS = st.sampled_from([[], [0], [1, 2, 3], [0] * 70, ["a"], ["a b"] * 64, [b"\xff"], [2**31 - 1] * 3])
TEXTS = st.sampled_from(["", "x", "gpt2", "llama", "tekken", "{{ x }}", "\0", "nemotron_h", "a\nb"])
VALUES = NUMBERS | LISTS | TEXTS | st.booleans()
SIZES = st.sampled_from([0, 1, 2, 3, 16, 32, 33, 64, 65, 256, 2**31, 2**62, 2**63])
OFFSETS = st.sampled_from([0, 1, 31, 32, 64, 4096, 2**40, 2**63, 2**64 - 32])
TYPES = st.sampled_from([0, 1, 2, 8, 12, 16, 24, 30, 34, 39, 40, 41, 99, 2**32 - 1])
WHERE = st.integers(0, 2**30)
CHANGE = st.one_of(
    st.tuples(st.just("value"), WHERE, VALUES), st.tuples(st.just("take"), WHERE, st.none()),
    st.tuples(st.just("dims"), WHERE, st.lists(SIZES, max_size=5)), st.tuples(st.just("type"), WHERE, TYPES),
    st.tuples(st.just("offset"), WHERE, OFFSETS), st.tuples(st.just("name"), WHERE, WHERE),
)  # fmt: skip


def changed(metadata: dict, entries: list, changes) -> tuple[dict, list]:
    """Return a header after some changes."""
    metadata, entries = deepcopy(metadata), list(entries)
    for what, where, new in changes:
        keys = list(metadata)
        key, i = keys[where % len(keys)], where % max(1, len(entries))
        match what:
            case "value":
                metadata[key] = new
            case "take":
                del metadata[key]
            case "dims":
                entries[i] = entries[i]._replace(dims=tuple(new))
            case "name":
                entries[i] = entries[i]._replace(name=entries[new % len(entries)].name)
            case _:
                entries[i] = entries[i]._replace(**{what: new})
    return metadata, entries


def works_or_is_refused(path: Path) -> None:
    """Open a file, read all of it and its texts."""
    for use in (
        everything,
        lambda: tokenizer_of(path, CFG).encode("the cat"),
        lambda: ChatTemplate.load(path),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                use(path) if use is everything else use()
        except InputError as refused:
            sentence = str(refused)
            assert 10 < len(sentence) < 1000 and sentence.splitlines() == [sentence]


def everything(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        for name, at in checkpoint.stored.items():
            weight = checkpoint.read(name)
            assert weight.shape == at.shape
            assert isinstance(weight, np.ndarray) or weight.dequantize().shape == at.shape
        checkpoint.digest()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf") / "x.gguf", GOOD.read_bytes(), parts(GOOD)


def damaged(examples: int):
    """Return the test with this many examples: wrong bytes, mostly of the header, or a wrong header."""

    @tries(examples, suppress_health_check=list(HealthCheck))
    @given(edits=EDITS, changes=st.lists(CHANGE, min_size=1, max_size=3), what=st.integers(0, 5))
    def check(good, edits, changes, what):
        path, raw, (metadata, entries, data) = good
        header = len(raw) - len(data)
        if what == 0:
            path.write_bytes(edited(raw, edits))
        elif what < 3:
            path.write_bytes(edited(raw[:header], edits) + raw[header:])
        else:
            path.write_bytes(gguf_bytes(*changed(metadata, entries, changes), data))
        works_or_is_refused(path)

    return check


@pytest.mark.parametrize("part", [0, *thorough(*range(1, 9))])
def test_a_value_of_another_type_is_refused_in_one_line_for_every_key(good, part):
    """Each key takes a ninth of the values, and the next key the next ninth."""
    path, _, (metadata, entries, data) = good
    arch = metadata["general.architecture"]
    known = (*config.SIZES.values(), *config.OF_LAYERS.values(), *config.NEUTRAL, "attention.value_length")
    more = [f"{arch}.{key}" for key in known] + [config.OWN_CHUNK, "tokenizer.chat_template"]
    more += ["general.alignment", "split.count", "split.tensors.count"]
    values = ([], [1], [0, 0, 0], [1.5], ["a"], [True], "", "x", True, 0, -1, 2**32 - 1, 1.5, -0.0)
    for key, value in [*product(metadata | dict.fromkeys(more), values)][part::9]:
        path.write_bytes(gguf_bytes(metadata | {key: value}, entries, data))
        works_or_is_refused(path)


def test_damage_is_refused_in_one_line(good):
    damaged(60)(good)


@pytest.mark.thorough
def test_two_thousand_kinds_of_damage_are_refused_in_one_line(good):
    damaged(2_000)(good)

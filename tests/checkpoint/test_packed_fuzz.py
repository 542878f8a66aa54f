"""A damaged packed file is read, or refused in one line: no traceback."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from refengine.checkpoint import Checkpoint
from refengine.spec.config import InputError
from refengine.spec.quant import Packed
from tests.checkpoint.test_fuzz import EDITS, edited
from tests.support.checkpoints import join, parts
from tests.support.packed import mixed, packed_checkpoint
from tests.support.tries import tries

DTYPES = st.sampled_from(["BF16", "F32", "U8", "I8", "F8_E4M3", "F8_E5M2", "F4", "U32"])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 16, 32, 48, 64, 96, 128, 160]), max_size=3)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Return a mixed checkpoint and the bytes of its file."""
    path = packed_checkpoint(tmp_path_factory.mktemp("packed"), mixed)
    return path, (path / "model.safetensors").read_bytes()


def read_or_refused(path, raw: bytes) -> None:
    (path / "model.safetensors").write_bytes(raw)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            checkpoint = Checkpoint.open(path)
            for name in checkpoint.stored:
                if isinstance(weight := checkpoint.read(name), Packed):
                    assert weight.dequantize().shape == checkpoint.stored[name].shape
    except InputError as error:
        assert str(error).splitlines() == [str(error)]


def damaged(examples: int):
    """Return the test with this many examples of damage: bytes anywhere, or an entry of the header."""

    @tries(examples, suppress_health_check=list(HealthCheck))
    @given(edits=EDITS, entry=st.integers(0, 10**6), dtype=DTYPES, shape=SHAPES, what=st.integers(0, 3))
    def check(good, edits, entry, dtype, shape, what):
        path, raw = good
        if what == 0:
            return read_or_refused(path, edited(raw, edits))
        (path / "model.safetensors").write_bytes(raw)
        header, data = parts(path / "model.safetensors")
        names = [name for name in header if name != "__metadata__"]
        name = names[entry % len(names)]
        if what == 1:
            header[name]["dtype"] = dtype
        elif what == 2:
            header[name]["shape"] = shape
        else:
            header[name + "x"] = header.pop(name)
        return read_or_refused(path, join(header, data))

    return check


def test_damage_is_refused_in_one_line(good):
    damaged(40)(good)


@pytest.mark.thorough
def test_two_thousand_kinds_of_damage_are_refused_in_one_line(good):
    damaged(2_000)(good)

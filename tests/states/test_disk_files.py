"""A directory of prefixes loses the files that are damaged or over the budget, and no others."""

import errno
import os
import resource

import numpy as np
import pytest

from refengine.conformance.cases import Case
from refengine.states.arrays import shapes
from refengine.states.disk import Disk
from refengine.states.prefixes import keys
from refengine.states.state import State

MODEL = "0123456789abcdef"
IDS = [5, 6, 7, 8]


@pytest.fixture
def disk(tmp_path):
    """Return a directory that holds the state of three tokens."""
    case = Case(layers="M*")
    made = Disk(tmp_path, 2**20, case.cfg, lambda: MODEL, keys)
    made.keep(state(case, IDS[:3]))
    assert made.holds(IDS[:3])
    return made


def state(case: Case, ids: list[int]) -> State:
    """Return a state after these tokens, of zeros."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes(case.cfg, len(ids)).items()}
    return State(MODEL, tuple(ids), len(ids), arrays)


def test_a_file_whose_time_may_not_be_set_is_used_and_stays(disk, monkeypatch):
    """The time of a file of another user may not be set."""

    def refused(path):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    assert disk.longest(IDS, 0).ids == tuple(IDS[:3])
    assert disk.holds(IDS[:3])


def test_a_file_that_the_system_does_not_let_be_read_stays(disk):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    [path] = disk.files().values()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # EMFILE
        assert disk.read(path, IDS[:3]) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert disk.longest(IDS, 0).ids == tuple(IDS[:3])


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_file_whose_size_cannot_be_had_stays(disk, monkeypatch, error):
    [path] = disk.files().values()

    def fails(*_, **__):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", fails)
        assert disk.read(path, IDS[:3]) is None
    assert disk.holds(IDS[:3])


def test_a_damaged_file_is_removed(disk):
    [path] = disk.files().values()
    path.write_bytes(path.read_bytes()[:-1])
    assert disk.longest(IDS, 0) is None and not path.exists()

"""A directory of prefixes loses the files that are damaged or over the budget, and no others."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refengine.conformance.cases import Case
from refengine.states.arrays import shapes
from refengine.states.disk import PARTIAL, Disk
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


def test_the_parts_of_files_of_killed_processes_are_removed_after_an_hour(disk):
    """A part that may still be written to stays, and so do files of other names."""
    names = [f".{next(iter(disk.files().values())).name}.{pid}.0123abcd.partial" for pid in (1, 99999)]
    others = [".notes.1.0123abcd.partial", f"{names[0]}.old", ".probe-5"]
    for name in (*names, *others):
        (disk.directory / name).write_bytes(b"part")
    for name in (names[0], *others):
        os.utime(disk.directory / name, (time.time() - 4000,) * 2)
    disk.shrink()
    assert {names[0], names[1], *others} - set(os.listdir(disk.directory)) == {names[0]}


def test_the_part_of_a_killed_process_has_the_name_that_is_removed(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from refengine.states import file
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
file.replace_file(Path({str(tmp_path)!r}) / "{MODEL}-v1-3-{"a" * 32}.state", [b"x"])
"""
    run = subprocess.run([sys.executable, "-c", script])
    [name] = os.listdir(tmp_path)
    assert run.returncode == -signal.SIGKILL and PARTIAL.fullmatch(name)


def test_two_processes_with_one_id_may_open_a_directory_at_once(tmp_path, monkeypatch):
    """As in two containers that share it: the other has removed the file with which writing is tried."""
    touch = Path.touch

    def touched(path):
        touch(path)
        path.unlink()

    monkeypatch.setattr(Path, "touch", touched)
    Disk(tmp_path, 1, Case(layers="M").cfg, lambda: MODEL, keys)

"""The time limit of a compiler grows with the load of the machine."""

import subprocess

import pytest

from refengine.backends.cpu import build


def test_a_compiler_has_more_time_where_there_is_more_work_than_processors(monkeypatch):
    monkeypatch.setattr(build, "LOOK", 0.1)
    monkeypatch.setattr(build, "PATIENCE", 0.2)
    monkeypatch.setattr(build, "busy", lambda: 100.0)
    build.run(["sleep", "1"])
    monkeypatch.setattr(build, "busy", lambda: 1.0)
    with pytest.raises(subprocess.TimeoutExpired, match="timed out"):
        build.run(["sleep", "30"])


@pytest.mark.parametrize("load, times", [(0.0, 1), (4.0, 1), (12.0, 3)])
def test_the_load_is_that_of_a_processor(monkeypatch, load, times):
    monkeypatch.setattr(build.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(build.os, "getloadavg", lambda: (load, 99.0, 99.0))
    assert build.busy() == times


def test_a_system_that_does_not_count_its_load_is_not_busy(monkeypatch):
    monkeypatch.delattr(build.os, "getloadavg")
    assert build.busy() == 1

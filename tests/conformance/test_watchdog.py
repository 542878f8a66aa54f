"""A process that computes rows costs one row where it ends, whatever it was doing."""

import subprocess
import sys
from multiprocessing.context import SpawnProcess

import pytest

from refengine.conformance.report import Plan
from refengine.conformance.watchdog import Watchdog
from refengine.spec.config import InputError

pytestmark = pytest.mark.slow


def test_a_process_that_has_ended_between_two_rows_costs_the_second_of_them():
    dog = Watchdog({"name": "numpy"}, limit=120)
    try:
        dog.start()
        dog.process.kill()
        dog.process.join()
        row = dog.judge("all_reduce", Plan(examples=1))
        assert row.verdict == "wrong"
        assert row.why == "before its first case: the process ended with signal SIGKILL"
        assert dog.judge("all_reduce", Plan(examples=1)).verdict == "pass"
    finally:
        dog.close()


ORPHAN = """
import os
from refengine.conformance.watchdog import Watchdog
Watchdog({"name": "numpy"}, 120).start()
os._exit(0)
"""


def test_a_process_whose_report_was_killed_ends_in_silence():
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stdout and not done.stderr


def test_a_file_that_ends_the_process_at_once_is_named(tmp_path):
    path = tmp_path / "ends.py"
    path.write_text("import os; os._exit(3)")
    with pytest.raises(InputError) as error:
        Watchdog({"name": str(path)}, limit=120).start()
    assert str(error.value) == f"{path} cannot be loaded: the process ended with code 3"


def test_a_process_that_cannot_be_started_leaves_nothing_to_end(monkeypatch):
    def full(process):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(SpawnProcess, "start", full)
    dog = Watchdog({"name": "numpy"}, limit=120)
    with pytest.raises(BlockingIOError):
        dog.start()
    dog.close()

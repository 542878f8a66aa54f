"""A process that computes rows costs one row where it ends, whatever it was doing."""

import pytest

from refengine.conformance.report import Plan
from refengine.conformance.watchdog import Watchdog

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

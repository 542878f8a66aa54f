"""The suite for a GPU reads the output of its tools, keeps its time limit, and reports a missing GPU."""

import sys

import pytest

from tools.cuda import gpu_suite
from tools.cuda.gpu_suite import Clock, finding, last_line, speeds

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at rms_norm+0x1f0 in rms_norm.cu:20
=========     by thread (3,0,0) in block (0,0,0)
========= ERROR SUMMARY: 2 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


def test_a_sanitizer_s_finding_is_its_first_error_and_their_number():
    assert finding(MEMCHECK, "") == "Invalid __global__ write of size 4 bytes; 2 errors"
    assert finding(CLEAN, "") == "0 errors"
    assert finding(RACES, "") == "0 hazards displayed (0 errors, 0 warnings)"
    assert finding("", "python: cannot open") == "python: cannot open"


def test_a_benchmark_s_rows_are_its_speeds():
    rows = '{"what": "machine"}\n{"what": "decode", "batch": 8, "tokens": 64, "tokens_per_second": 812.4}\n'
    assert speeds(rows, "") == "decode 8x64: 812/s"
    assert speeds("", "refengine: there is no driver\n") == "refengine: there is no driver"


def test_a_test_run_s_last_line_is_its_summary():
    assert last_line("....\n==== 4 passed in 0.1s ====\n", "") == "4 passed in 0.1s"


@pytest.mark.parametrize(
    "script, longest, result, seen",
    [
        ("print('done')", 60, "passed", "done"),
        ("raise SystemExit('broken')", 60, "failed", "broken"),
        ("import time; time.sleep(600)", 1.2, "too long", "more than 1 s"),
    ],
)
def test_a_check_passes_fails_or_takes_too_long(script, longest, result, seen):
    check = Clock(2).run("a check", [sys.executable, "-c", script], longest, last_line)
    assert (check.result, check.seen) == (result, seen) and check.seconds < 60


def test_when_no_time_is_left_the_rest_is_not_run():
    assert Clock(0).run("late", ["nothing"], 60, last_line).result == "not run"
    assert sum(gpu_suite.LONGEST[key] * n for key, n in dict(tests=1, sanitizer=4, bench=2).items()) <= 600


def test_without_a_device_the_suite_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert gpu_suite.main([]) == 1
    out, err = capsys.readouterr()
    assert not out and err == "gpu_suite: the cuda backend needs CuPy: pip install 'refengine[cuda]'\n"


def test_the_suite_runs_the_tests_of_the_cuda_backend():
    assert __file__ in gpu_suite.cuda_tests() and len(gpu_suite.cuda_tests()) > 10

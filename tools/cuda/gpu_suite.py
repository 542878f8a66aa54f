"""All that only a GPU can tell, in one command of at most ten minutes, as one table.

    python -m tools.cuda.gpu_suite [--model DIRECTORY] [--minutes 10]

The tests marked gpu; compute-sanitizer, where it is installed, over prompts and steps of the embedded model;
then `refengine bench`. Needs a driver, and `pip install -e '.[cuda,test]'`. Ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
LONGEST = {"tests": 240, "sanitizer": 45, "bench": 90}  # seconds


class Check(NamedTuple):
    """A row of the table."""

    name: str
    result: str  # passed, failed, too long, not run
    seconds: float
    seen: str


class Clock:
    """The time that is left for all checks together."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def run(self, name: str, command: list[str], longest: float, read) -> Check:
        """Run a command as a check; `read` finds in its output the text to show."""
        limit, began = min(longest, self.end - time.monotonic()), time.monotonic()
        if limit < 1:
            return Check(name, "not run", 0, "no time was left")
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return Check(name, "too long", time.monotonic() - began, f"more than {limit:.0f} s")
        result = "failed" if done.returncode else "passed"
        return Check(name, result, time.monotonic() - began, read(done.stdout, done.stderr))


def checks(model: str, minutes: float):
    """Yield every check, as soon as it is done."""
    clock, python = Clock(minutes), sys.executable
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider"]
    yield clock.run("tests", [*tests, *cuda_tests()], LONGEST["tests"], last_line)
    name = "compute-sanitizer"
    sanitizer = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    for tool in SANITIZERS:
        if sanitizer is None:
            yield Check(tool, "not run", 0, "there is no compute-sanitizer here")
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, __file__, "--exercise"]
        yield clock.run(tool, command, LONGEST["sanitizer"], finding)
    for dtype in ("float32", "bfloat16"):
        command = [python, "-m", "refengine", "bench", "--backend", "cuda", "--device", "cuda", "--json"]
        command += ["--dtype", dtype, "--model", model]
        yield clock.run(f"bench {dtype}", command, LONGEST["bench"], speeds)


def cuda_tests() -> list[str]:
    """Return the test files of the CUDA backend."""
    return sorted(str(path) for path in (ROOT / "tests" / "backends" / "cuda").glob("test_*.py"))


def last_line(out: str, err: str) -> str:
    """Return the summary of pytest, or the error that stopped it."""
    lines = [line.strip("= ") for line in (out or err).splitlines() if line.strip("= ")]
    return lines[-1] if lines else ""


def finding(out: str, err: str) -> str:
    """Return the first error of compute-sanitizer, and how many there are."""
    errors = re.findall(r"^========= (?!COMPUTE|ERROR SUMMARY|RACECHECK)(\S.*)$", out, re.MULTILINE)
    total = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", out)
    return "; ".join([*errors[:1], total[1] if total else last_line(out, err)])


def speeds(out: str, err: str) -> str:
    """Return the tokens per second of each measurement."""
    try:
        rows = [json.loads(line) for line in out.splitlines()]
    except ValueError:
        rows = []
    told = [f"{r['what']} {r['batch']}x{r['tokens']}: {r['tokens_per_second']:.0f}/s" for r in rows[1:]]
    return ", ".join(told) or last_line(out, err)


def exercise() -> None:
    """Run the embedded model in both builds, for compute-sanitizer: two prompts, then some steps."""
    import refengine
    from refengine.backends.cuda import cuda_backend
    from refengine.backends.cuda.device import CupyDevice
    from refengine.runner import How, LocalRunner, Part
    from refengine.spec.model import Model

    checkpoint, device = refengine.load("tiny").checkpoint, CupyDevice(pooled=False)
    for dtype in ("float32", "bfloat16"):
        model = Model.build(checkpoint.config, checkpoint.read, cuda_backend(dtype, device))
        runner, how = LocalRunner(model), How()
        drawn = runner.read([Part(0, [7] * 150, how, True), Part(1, [11] * 40, how, True)])
        for _ in range(3):
            drawn = runner.step([0, 1], [draw.id for draw in drawn])
    device.sync()


def facts() -> str:
    """Return the device in a line. InputError where there is none."""
    from refengine.backends.cuda.device import CupyDevice

    device = CupyDevice()
    runtime = device.cupy.cuda.runtime
    free, total = (f"{n / 2**30:.1f}" for n in device.memory)
    return (
        f"{device.name}, {device.arch}, {free} of {total} GiB free, driver for CUDA "
        f"{runtime.driverGetVersion() / 1000:.1f}, CuPy {device.cupy.__version__}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the suite on this machine's GPU, print its table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="what is measured: a directory, or tiny")
    parser.add_argument("--minutes", type=float, default=10, help="all checks together end after these")
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    from refengine.spec.config import InputError

    try:
        if chosen.exercise:
            exercise()
            return 0
        print(f"{facts()}\n\n| check | result | s | |\n|---|---|---|---|", flush=True)
    except InputError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 1
    results = []
    for check in checks(chosen.model, chosen.minutes):
        results.append(check.result)
        print(f"| {check.name} | {check.result} | {check.seconds:.0f} | {check.seen} |", flush=True)
    return int(any(result in ("failed", "too long") for result in results))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())

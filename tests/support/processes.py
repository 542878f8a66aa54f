"""Run ranks as processes of mpiexec and torchrun, and record how the jobs end.

    job = mpiexec(4, "generate", "Once upon a time", "--tp", 2, "--ep", 2)
    job = torchrun(2, "generate", ..., fault=(1, "decode", "kill"))
    ended_badly(job, speak={0}, about="rank 1")

A job that hangs is killed, and fails the test. Every process of a job carries its mark in the environment,
which finds the processes that outlive it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
MPIEXEC = shutil.which("mpiexec", path=f"{BIN}:{os.environ.get('PATH', '')}")
MARK = "REFENGINE_TEST_JOB"
FAULTY = str(Path(__file__).with_name("faulty_rank.py"))
LIMIT = 90  # seconds; a job that takes longer hangs; more on a busy machine
BOUND = 60  # seconds in which a job with a fault has to end, start included; more on a busy machine


@dataclass(frozen=True)
class Job:
    """The result of a job: exit code, output, seconds, and command lines of processes that outlived it."""

    code: int
    out: str
    err: str
    seconds: float
    left: tuple[str, ...]

    @property
    def said(self) -> dict[int, list[str]]:
        """Return the sentences that each rank printed on stderr, by rank."""
        said: dict[int, list[str]] = {}
        for rank, sentence in re.findall(r"^refengine, rank (\d+): (.+)$", self.err, re.MULTILINE):
            said.setdefault(int(rank), []).append(sentence)
        return said


def ended_badly(job: Job, speak=(), about: str = "") -> None:
    """Check that a job failed, in time, left no process, and that no rank printed more than one sentence.

    speak: ranks that must have printed one; it matches `about`.
    """
    assert job.code != 0 and job.seconds < BOUND * busy() and job.left == (), job
    assert not re.search(r'File ".*(refengine|spec|backends|faulty_rank)\b', job.err), job.err
    assert all(len(sentences) == 1 for sentences in job.said.values()), job.err
    for rank in speak:
        assert rank in job.said and re.search(about, job.said[rank][0]), (rank, job.err)


def mpiexec(n: int, *args, fault=None, text: str = "", **how) -> Job:
    """Run refengine on ranks of MPI and return the Job; fault: (rank, when, what) of faulty_rank.py."""
    return finish(start([*by_mpiexec(n), *program(fault), *args], **how), text)


def torchrun(n: int, *args, fault=None, text: str = "", **how) -> Job:
    """Run refengine on ranks of torch.distributed and return the Job; fault as for mpiexec."""
    return finish(start([*by_torchrun(n), *program(fault), *args], **how), text)


def by_mpiexec(n: int, *options) -> list:
    """Return the command that starts Python on n ranks of MPI; skips the test without mpiexec or mpi4py."""
    if MPIEXEC is None:
        pytest.skip("there is no mpiexec: pip install mpich")
    pytest.importorskip("mpi4py", reason="ranks under mpiexec need mpi4py")
    return [MPIEXEC, *options, "-n", n, sys.executable]


def by_torchrun(n: int, *options) -> list:
    """Return the command that starts n ranks of torch.distributed on this host; skips without torch."""
    pytest.importorskip("torch")
    where = options or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", n]


def program(fault=None) -> list:
    """Return the arguments of Python for refengine, or for refengine with a fault in one rank."""
    return [FAULTY, *fault] if fault else ["-m", "refengine"]


def start(command, stdout=subprocess.PIPE, env=(), **how) -> subprocess.Popen:
    """Start a command in a session of its own, with a mark in its environment, and return the process."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"} | dict(env),
        start_new_session=True,
        **how,
    )
    process.mark, process.began = mark, time.monotonic()
    return process


def busy() -> float:
    """Return how many processes there are for each processor of this machine, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def finish(process: subprocess.Popen, text: str = "", limit: float = LIMIT) -> Job:
    """Wait for the end of a job, kill all that is left of it, and return the Job; a hang fails the test."""
    try:
        out, err = process.communicate(text.encode(), limit * busy())
        seconds = time.monotonic() - process.began
        left = tuple(outlived(process.mark))
    except subprocess.TimeoutExpired:
        pytest.fail(f"the job hangs; there are {list(map(name, living(process.mark)))}")
    finally:
        for pid in living(process.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return Job(process.returncode, (out or b"").decode(), err.decode(), seconds, left)


def outlived(mark: str, grace: float = 2.0) -> list[str]:
    """Return the command lines of a job's processes that are still there after `grace` seconds."""
    until = time.monotonic() + grace
    while (pids := living(mark)) and time.monotonic() < until:
        time.sleep(0.02)
    return [name(pid) for pid in pids]


def living(mark: str) -> list[int]:
    """Return the processes that carry the mark (where there is /proc)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def name(pid: int) -> str:
    """Return the command line of a process, or ""."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""

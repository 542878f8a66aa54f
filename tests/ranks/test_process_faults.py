"""A job ends soon after a rank fails, and every other rank prints the reason once.

A fault is (rank, when, what) of faulty_rank.py. mpiexec kills all ranks as soon as it notices a dead one,
before they can print anything. So some faults hide the death from mpiexec ("vanish"), as if the host were
lost.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import refengine
from tests.support.processes import by_mpiexec, ended_badly, finish, living, mpiexec, name, program, start
from tests.support.tries import thorough

pytestmark = pytest.mark.slow
TIMEOUT = 3  # seconds
ALL = {0, 1, 2, 3}
SHORT = ["generate", "Once upon a time", "-n", 9, "-t", 0, "--tp", 2, "--timeout", TIMEOUT]
TINY = Path(refengine.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return a function that runs a job of four ranks, with two prompts."""
    path = tmp_path_factory.mktemp("prompts") / "two"
    path.write_text("Once upon a time\nOne day, Lily\n")
    args = ["generate", "--prompts", path, "-n", 30, "-t", 0, "--timeout", TIMEOUT]
    return lambda *fault, layout="--tp=2 --ep=2": mpiexec(4, *args, *layout.split(), fault=fault)


@pytest.mark.parametrize("when", ["start", "decode", *thorough("meet", "load", "prefill")])
def test_a_rank_that_is_killed_ends_the_job(job, when):
    ended_badly(job(1, when, "kill"))


VERBS = ("all_reduce", "all_gather", "reduce_scatter", "share", "broadcast", "compare", "load", "prefill")
MOMENTS = [
    ("--tp=2 --pp=2", "decode"),
    ("--tp=2 --ep=2", "all_reduce"),
    *thorough(*(("--tp=2 --ep=2", verb) for verb in VERBS if verb != "all_reduce")),
    *thorough(*(("--tp=2 --pp=2", verb) for verb in ("send", "receive"))),
]


@pytest.mark.parametrize("layout, when", MOMENTS)
def test_a_rank_that_dies_with_its_machine_is_named_by_all_others(job, layout, when):
    rank = 2 if when == "receive" else 1
    done = job(rank, when, "vanish", layout=layout)
    ended_badly(done, ALL - {rank}, rf"\brank {rank}\b")


@pytest.mark.parametrize(
    "layout, when",
    [
        ("--tp=2 --pp=2", "decode"),
        *thorough(*(("--tp=2 --ep=2", when) for when in ("load", "prefill", "share")), ("--pp=4", "end")),
    ],
)
def test_a_rank_that_hangs_is_named_by_all_others(job, layout, when):
    ended_badly(job(1, when, "stop", layout=layout), ALL - {1}, r"\brank 1\b")


@pytest.mark.parametrize("when", ["meet", "leave", *thorough("start")])
def test_ranks_do_not_wait_for_ever_for_one_that_never_comes(job, when):
    done = job(1, when, "stop")
    ended_badly(done, done.said or {0}, "not all ranks came (to the end )?within 3 s")


@pytest.mark.parametrize("rank, when", [(0, "request"), *thorough((1, "exit"))])
def test_a_rank_that_is_stopped_where_no_other_waits_for_it_ends_the_job(rank, when):
    """The others wait without a limit for the first request, and for nothing once MPI has ended."""
    done = mpiexec(2, *SHORT, fault=(rank, when, "stop"))
    ended_badly(done, {rank}, "this process was stopped for 6 s")
    assert done.said.keys() == {rank}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(50))
def test_a_job_ends_soon_whichever_of_its_processes_is_stopped_at_any_time(seed):
    """Ranks and their guards, from the start of mpiexec to the end of a run."""
    rng = random.Random(seed)
    process = start([*by_mpiexec(2), *program(), *SHORT])
    until = time.monotonic() + rng.uniform(0.1, life())
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    if pids := ranks(process.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(pids), signal.SIGSTOP)
    stopped = time.monotonic()
    job = finish(process)
    assert job.left == () and job.seconds - (stopped - process.began) < TIMEOUT + 10, job


@functools.cache
def life() -> float:
    """Return the seconds that an undisturbed run takes."""
    return mpiexec(2, *SHORT).seconds


def ranks(mark: str) -> list[int]:
    """Return the processes of a job that are ranks or their guards."""
    return [pid for pid in living(mark) if "-m refengine" in name(pid) and "mpiexec" not in name(pid)]


@pytest.mark.thorough
def test_a_rank_may_load_for_longer_than_the_timeout(job):
    done = job(1, "load", "dawdle")
    assert (done.code, done.said, done.left) == (0, {}, ()) and done.seconds > 2 * TIMEOUT


@pytest.mark.parametrize(
    "layout, rank, when",
    [
        ("--tp=2 --ep=2", 1, "decode"),
        *thorough(("--tp=2 --pp=2", 0, "prefill"), ("--ep=2 --pp=2", 3, "decode"), ("--pp=4", 1, "prefill")),
    ],
)
def test_a_rank_may_compute_for_longer_than_the_timeout(job, layout, rank, when):
    """It sends heartbeats between two layers, and so do the ranks that wait for it."""
    done = job(rank, when, "dawdle", layout=layout)
    assert (done.code, done.said, done.left) == (0, {}, ()) and done.seconds > TIMEOUT
    assert done.out == job(rank, "is", refengine.__version__).out


TALKS = """
from refengine.ranks.comm.mpi import MPI
comm = MPI()
comm.heartbeat.timeout = 0  # a heartbeat is always due
for _ in range(50 * comm.rank):
    comm.at_work()
comm.heartbeat.timeout = comm.timeout
comm.leave(0)
"""


def test_heartbeats_that_were_not_received_do_not_spoil_the_end():
    """(MPI_Finalize fails if a message was not received.)"""
    done = finish(start([*by_mpiexec(3), "-c", TALKS]))
    assert (done.code, done.err, done.left) == (0, "", ())


@pytest.mark.parametrize(
    "rank, when, what, says",
    [
        (1, "decode", "MemoryError", "not enough memory"),
        (2, "draws", "nan", "the logits hold NaN"),
        *thorough(
            (0, "load", "OSError", "No space left on device"),
            (1, "load", "MemoryError", "not enough memory"),
            (0, "draws", "nan", "the logits hold NaN"),
        ),
    ],
)
def test_what_stops_one_rank_is_said_by_all(job, rank, when, what, says):
    """(Ranks 0 and 2 draw, for one prompt each.)"""
    done = job(rank, when, what)
    ended_badly(done, ALL, says)
    ended_badly(done, ALL - {rank}, rf"^rank {rank} stopped: ")


@pytest.mark.parametrize(
    "when, what, says",
    [
        ("says", "--dtype=float64", "a different backend and dtype than .*numpy in float64"),
        ("says", "--tp=4 --ep=1", "a different layout than .*tp 4, ep 1, pp 1"),
        ("is", "0.0.9", r"a different version of refengine than .*0\.0\.9"),
        ("says", "--model=nowhere", "there is no model 'nowhere'"),
        *thorough(
            ("says", "--backend=torch", "a different backend and dtype than .*torch in "),
            ("says", "--tp=3", "started 4 ranks, and tp = 3, ep = 2, pp = 1 needs 6"),
            ("says", "--colour", "No such option"),
        ),
    ],
)
def test_a_rank_unlike_the_others_is_named(job, when, what, says):
    speak = ALL - {1} if what == "--colour" else ALL
    ended_badly(job(1, when, what), speak, says)


def other(directory: Path, change) -> Path:
    """Return the directory of a copy of the embedded model, its file of weights changed."""
    shutil.copytree(TINY, directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    return directory


def last_byte_changed(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_rank_with_other_weights_is_named_by_their_fingerprint(job, tmp_path):
    other(tmp_path / "tiny", last_byte_changed)
    done = job(1, "says", f"--model={tmp_path / 'tiny'}")
    ended_badly(done, ALL, r"a different checkpoint than .*tiny \(\w{16}\), not tiny \(\w{16}\)")


def test_a_truncated_file_on_one_rank_ends_the_job(job, tmp_path):
    other(tmp_path / "tiny", lambda data: data[:-1000])
    done = job(1, "says", f"--model={tmp_path / 'tiny'}")
    ended_badly(done, ALL, "is truncated")


@pytest.mark.parametrize(
    "rank, says", [("all", "need mpi4py: pip install"), *thorough((1, "need mpi4py|not all ranks came"))]
)
def test_a_missing_library_is_one_sentence(job, rank, says):
    ended_badly(job(rank, "lacks", "mpi4py"), ALL, says)


def test_a_wrong_command_is_explained_once():
    """(The exit code is 2, unless mpiexec sees one rank end before the others and kills them.)"""
    done = mpiexec(4, "generate", "x", "--colour")
    ended_badly(done)
    assert done.err.count("No such option") == 1


ENDLESS = ["-m", "refengine", "generate", "Once", "-n", 9000, "--ignore-eos", "--tp", 2]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL, *thorough(signal.SIGTERM)])
def test_ranks_end_with_their_launcher(sign):
    process = start([*by_mpiexec(2), *ENDLESS])
    assert process.stdout.read(9)
    process.send_signal(sign)
    ended_badly(finish(process))


def test_whoever_reads_the_output_may_leave():
    process = start([*by_mpiexec(2), *ENDLESS])
    assert process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    done = finish(process)
    assert done.left == () and "Traceback" not in done.err


def test_a_full_disk_ends_all_ranks():
    """mpiexec writes the output, and prints the error."""
    with open("/dev/full", "wb") as full:
        ended_badly(finish(start([*by_mpiexec(2), *ENDLESS], stdout=full)), about="No space left")

"""Under torchrun, a fault in one rank ends all ranks, and the other rank prints the reason.

The agent of torchrun holds the store through which ranks connect and report why they stop. If a rank dies
unnoticed ("vanish"), the agent is stopped, and the store with it.
"""

import pytest

from tests.ranks.test_processes import alone
from tests.support.processes import by_torchrun, ended_badly, finish, start, torchrun
from tests.support.tries import thorough

pytestmark = pytest.mark.slow
TIMEOUT = 6  # seconds: importing torch takes some


@pytest.fixture(scope="module")
def job():
    args = ["generate", "Once upon a time", "-n", 30, "-t", 0, "--timeout", TIMEOUT, "--backend", "numpy"]
    return lambda *fault, layout="--tp=2": torchrun(2, *args, layout, fault=fault)


@pytest.mark.parametrize(
    "rank, when, what, says",
    [
        (1, "load", "vanish", "connection to rank 1 is lost"),
        *thorough(
            (0, "all_reduce", "vanish", "rank 0 is lost"),
            (1, "decode", "vanish", "connection to rank 1 is lost"),
            (0, "broadcast", "vanish", "rank 0 is lost"),
            (1, "start", "stop", "the 2 ranks did not all connect to"),
            (1, "decode", "stop", "rank 1 did not answer within 6 s"),
            (1, "load", "MemoryError", "rank 1 stopped: there is not enough memory"),
            (0, "draws", "nan", "rank 0 stopped: the logits hold NaN"),
            (1, "is", "0.0.9", r"a different version of refengine than .*0\.0\.9"),
            (1, "says", "--dtype=float64", "a different backend and dtype than .*in float64"),
            (1, "lacks", "torch", "ended by the launcher"),
        ),
    ],
)
def test_the_other_rank_says_why(job, rank, when, what, says):
    ended_badly(job(rank, when, what), {1 - rank}, says)


@pytest.mark.thorough
def test_a_rank_may_load_for_longer_than_the_timeout(job):
    done = job(1, "load", "dawdle")
    assert (done.code, done.said, done.left) == (0, {}, ()) and done.seconds > TIMEOUT


@pytest.mark.thorough
@pytest.mark.parametrize("layout, rank, when", [("--tp=2", 1, "prefill"), ("--pp=2", 0, "decode")])
def test_a_rank_may_compute_for_longer_than_the_timeout(job, layout, rank, when):
    done = job(rank, when, "dawdle", layout=layout)
    assert (done.code, done.said, done.left) == (0, {}, ()) and done.seconds > TIMEOUT
    assert done.out == alone("generate", "Once upon a time", "-n", 30, "-t", 0)


@pytest.mark.thorough
def test_the_other_rank_says_why_from_within_a_compiled_step():
    how = ["--backend", "torch", "--dtype", "bfloat16", "--tp", 2, "--timeout", TIMEOUT]
    job = torchrun(2, "generate", "Once upon a time", "-n", 30, *how, fault=(0, "all_reduce", "vanish"))
    ended_badly(job, {1}, "rank 0 is lost")


@pytest.mark.thorough
@pytest.mark.parametrize("when", ["decode", "meet"])
def test_a_rank_that_is_killed_ends_the_job(job, when):
    """torchrun ends the other rank, possibly before it can print anything."""
    ended_badly(job(1, when, "kill"))


@pytest.mark.thorough
def test_a_full_disk_ends_all_ranks():
    with open("/dev/full", "wb") as full:
        job = torchrun(2, "generate", "Once", "-n", 9, "--tp", 2, "--timeout", TIMEOUT, stdout=full)
    ended_badly(job, {0, 1}, "No space left on device")


def test_a_missing_library_and_a_wrong_command_are_explained_by_every_rank_and_by_one(job):
    ended_badly(job("all", "lacks", "torch"), {0, 1}, "need PyTorch: pip install")
    done = job("all", "says", "--colour")
    ended_badly(done)
    assert done.err.count("No such option") == 1


@pytest.mark.thorough
def test_a_reader_of_the_output_may_leave():
    command = [*by_torchrun(2), "-m", "refengine", "generate", "Once", "-n", 9000, "--ignore-eos", "--tp", 2]
    process = start(command)
    assert process.stdout.read(1)
    process.stdout.close()
    process.stdout = None
    done = finish(process)
    assert (done.code, done.said, done.left) == (0, {}, ())

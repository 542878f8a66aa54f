"""Ranks under mpiexec and torchrun write the text of a single process."""

import json
import subprocess
import sys
from functools import cache

import ml_dtypes
import pytest

from refengine.spec.numerics import tolerance
from tests.support.processes import ended_badly, mpiexec, torchrun
from tests.support.tries import thorough

pytestmark = pytest.mark.slow
ONCE = "Once upon a time"
LONG = "Once there was a cat who sat on a mat in the sun. " * 50  # several calls of prefill


@cache
def alone(*args, text: str = "") -> str:
    """Return the output of a single process."""
    command = [sys.executable, "-m", "refengine", *map(str, args)]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def printed(job) -> str:
    """Return the output of a job, which must have succeeded."""
    assert (job.code, job.left) == (0, ()), job.err
    assert "Traceback" not in job.err and not job.said
    return job.out


def records(out: str) -> list[dict]:
    """Return the JSON lines by index, without measured values."""
    lines = [json.loads(line) for line in out.splitlines()]
    for line in lines:
        del line["statistics"]
    return sorted(lines, key=lambda line: line["index"])


def split(records: list[dict]) -> tuple[list, list]:
    """Return the log-probabilities of the records, and everything else."""
    numbers = [
        [top.pop("logprob") for token in record["logprobs"] for top in (token, *token["top"])]
        for record in records
    ]
    return numbers, records


def same(out: str, expected: str, dtype="float32") -> None:
    """Check for the same tokens and texts, and for log-probabilities that agree within rounding."""
    (mine, words), (theirs, expected_words) = split(records(out)), split(records(expected))
    assert words == expected_words
    near = tolerance(ml_dtypes.finfo(dtype).dtype, 160)  # the width of the stream
    for a, b in zip(mine, theirs, strict=True):
        assert a == pytest.approx(b, abs=near * max(map(abs, b)))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Return arguments for prompts of several lengths, one long, whose texts end at different times."""
    path = tmp_path_factory.mktemp("prompts") / "five"
    path.write_text("\n".join([ONCE, LONG, "One day, Lily", "The big red ball", "Tom"]))
    how = ["-n", 24, "--stop", ".", "-t", 0, "--json", "--logprobs", 2, "--dtype", "float32"]
    return ["generate", "--prompts", path, *how]


LAYOUTS = [(4, "--tp=2 --ep=2"), (4, "--tp=2 --pp=2")]
LAYOUTS += thorough(
    (2, "--tp=2"),
    (2, "--ep=2"),
    (2, "--pp=2"),
    (4, "--tp=4"),
    (4, "--ep=4"),
    (4, "--pp=4"),
    (4, "--ep=2 --pp=2"),
)


def test_the_prompts_of_these_tests_end_at_different_times_and_one_takes_several_calls(several):
    lines = [json.loads(line) for line in alone(*several).splitlines()]
    assert max(line["statistics"]["prompt_tokens"] for line in lines) > 512
    assert len({len(line["token_ids"]) for line in lines}) > 2


@pytest.mark.parametrize("n, layout", LAYOUTS)
def test_mpi_ranks_write_the_texts_of_one_process(n, layout, several):
    same(printed(mpiexec(n, *several, *layout.split())), alone(*several))


def test_fewer_prompts_than_ranks_of_ep_are_not_split(tmp_path):
    (tmp_path / "two").write_text(f"{ONCE}\nOne day")
    args = ["generate", "--prompts", tmp_path / "two", "-n", 12, "-t", 0, "--json", "--logprobs", 0]
    same(printed(mpiexec(4, *args, "--ep", 4)), alone(*args))


def test_a_text_streams_from_rank_0_alone_and_its_seed_draws_the_same():
    args = ["generate", ONCE, "-n", 30, "--seed", 4]
    assert printed(mpiexec(2, *args, "--tp", 2)) == alone(*args)


def test_logprobs_and_statistics_come_once():
    args = ["generate", ONCE, "-n", 6, "-t", 0, "--logprobs", 2]
    job = mpiexec(2, *args, "--pp", 2, "--stats")
    assert printed(job) == alone(*args)
    summary, *of_ranks = job.err.splitlines()
    assert "tokens/s" in summary and [line[:6] for line in of_ranks] == ["rank 0", "rank 1"]


def test_a_chat_answers_a_message_and_piped_lines():
    args = ["chat", "-n", 16, "-t", 0, "--no-thinking"]
    assert printed(mpiexec(2, *args, "Hi", "--tp", 2)) == alone(*args, "Hi")
    talk = "Hi\nTell me a story\n/new\nBye\n"
    job = mpiexec(4, *args, "--json", "--tp", 2, "--ep", 2, text=talk)
    assert len(job.out.splitlines()) == 3
    assert replies(printed(job)) == replies(alone(*args, "--json", text=talk))


def replies(out: str) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "statistics"} for line in out.splitlines()]


def test_a_layout_without_a_launcher_is_told_how_to_start_it():
    command = [sys.executable, "-m", "refengine", "generate", "x", "--tp", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "mpiexec -n 2" in done.stderr and "torchrun --nproc-per-node 2" in done.stderr


@pytest.mark.parametrize(
    "layout, says",
    [
        ("--tp=2 --ep=2", "mpiexec started 3 ranks, and tp = 2, ep = 2, pp = 1 needs 4"),
        (
            "--tp=3",
            "tp = 3 is not possible: mamba_num_heads = 4 is not a multiple of 3; the nearest possible: 2",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_one_sentence(layout, says):
    job = mpiexec(3, "generate", ONCE, *layout.split())
    ended_badly(job)
    assert job.said == {rank: [says] for rank in range(3)}


@pytest.mark.parametrize("n, layout", [(2, "--tp=2"), *thorough((4, "--ep=2 --pp=2"))])
def test_ranks_of_torchrun_write_the_texts_of_one_process(n, layout, several):
    args = [*several, "--backend", "torch"]
    same(printed(torchrun(n, *args, *layout.split())), alone(*args))


def test_torch_ranks_speak_mpi_too_and_have_the_logits_of_one_process_in_bfloat16(tmp_path):
    """Only for the first new token: a near tie may change later ones."""
    (tmp_path / "prompts").write_text(f"{ONCE}\nOne day, Lily\n{LONG}")
    args = [
        "generate",
        "--prompts",
        tmp_path / "prompts",
        "-n",
        1,
        "-t",
        0,
        "--json",
        "--logprobs",
        0,
        "--backend",
        "torch",
        "--dtype",
        "bfloat16",
    ]
    same(printed(mpiexec(2, *args, "--tp", 2)), alone(*args), "bfloat16")

"""score, bench and inspect on ranks print what one process prints, once."""

import json

import click
import ml_dtypes
import pytest

from refengine.cli import options
from refengine.spec.numerics import tolerance
from tests.ranks.test_processes import LONG, ONCE, alone, printed
from tests.support.processes import ended_badly, mpiexec, torchrun
from tests.support.tries import thorough

pytestmark = pytest.mark.slow


@pytest.fixture
def scored(tmp_path):
    """Return arguments that score a text of several calls, with the head too and a float32 cache."""
    (tmp_path / "text").write_text(LONG + ONCE)
    return ["score", tmp_path / "text", "--json", "--tokens", "--dtype", "float32"]


def same_scores(out: str, expected: str) -> None:
    mine, theirs = json.loads(out), json.loads(expected)
    assert mine["token_ids"] == theirs["token_ids"] and len(mine["token_ids"]) > 512
    assert len(mine["head_logprobs"]) == len(mine["logprobs"]) - 1
    for key in ("logprobs", "head_logprobs"):
        near = tolerance(ml_dtypes.finfo("float32").dtype, 160) * max(map(abs, theirs[key]))
        assert mine[key] == pytest.approx(theirs[key], abs=near)


@pytest.mark.parametrize("layout", ["--tp=2 --pp=2", *thorough("--tp=2 --ep=2", "--ep=4", "--pp=4")])
def test_ranks_score_a_text_as_one_process_does(layout, scored):
    """With the prediction head too, which is on the last stage."""
    same_scores(printed(mpiexec(4, *scored, *layout.split())), alone(*scored))


def test_a_text_that_has_no_score_is_refused_by_all_ranks(tmp_path):
    (tmp_path / "short").write_text("e")
    ended_badly(mpiexec(2, "score", tmp_path / "short", "--pp=2"), {0, 1}, "is a single token")


@pytest.mark.parametrize("layout", ["--tp=2", *thorough("--ep=2", "--pp=2")])
def test_bench_measures_what_was_asked_on_all_ranks(layout):
    asked = ["--prompt-tokens", "5,40", "--batch", "1,3", "--context", "9", "--repeat", 1, "--steps", 2]
    machine, *rows = map(json.loads, printed(mpiexec(2, "bench", *asked, "--json", layout)).splitlines())
    assert (machine["tp"], machine["ep"], machine["pp"]).count(2) == 1
    assert [(row["what"], row["batch"], row["tokens"]) for row in rows] == [
        ("prefill", 1, 5),
        ("prefill", 1, 40),
        ("decode", 1, 9),
        ("decode", 3, 9),
    ]
    assert all(row["tokens_per_second"] > 0 and row["peak_memory"] > 10**7 for row in rows)
    table = printed(mpiexec(2, "bench", *asked, layout)).splitlines()
    assert len([line for line in table if line.startswith(("| prefill", "| decode"))]) == 4


INSPECT = ["inspect", "--memory", "1GB"]  # free memory changes from one moment to the next


@pytest.mark.parametrize(
    "args", [INSPECT, *thorough(["--version"], ["--help"], ["score", "--help"])], ids=" ".join
)
def test_what_needs_no_ranks_is_printed_once_and_well(args):
    assert printed(mpiexec(3, *args)) == alone(*args)


@pytest.mark.thorough
def test_ranks_of_torchrun_score_as_one_process_does_and_print_once(scored):
    same_scores(printed(torchrun(2, *scored, "--pp", 2)), alone(*scored))
    assert printed(torchrun(2, *INSPECT)) == alone(*INSPECT)


@pytest.mark.parametrize("spelled", ["--timeout", "--patience", "REFENGINE_TIMEOUT", "REFENGINE_PATIENCE"])
def test_the_timeout_has_an_option_a_variable_and_their_old_names(spelled, monkeypatch):
    seen = []

    @click.command()
    @options.ranks
    def command(**how):
        seen.append(how["timeout"])

    args = [spelled, "7"] if spelled.startswith("--") else []
    if not args:
        monkeypatch.setenv(spelled, "7")
    command.main(args, standalone_mode=False)
    command.main([*args, "--timeout", "8"], standalone_mode=False)
    assert seen == [7.0, 8.0]

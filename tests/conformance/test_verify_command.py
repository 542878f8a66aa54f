"""`refengine verify` has the right exit codes and JSON, also for candidates that hang or crash."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import refengine
from refengine.cli.verify import verify
from refengine.conformance import prefill_decode, report
from refengine.spec.ops import numpy_backend

pytestmark = pytest.mark.slow

MINE = """
import os, time
import numpy as np

def wrong(h, up, down): return np.maximum(h @ up.T, 0) @ down.T
def hangs(h, up, down): time.sleep(1000)
def crashes(h, up, down): os.kill(os.getpid(), 11)
def talks(h, up, down):
    print("a line of the candidate")
    return np.maximum(h @ up.T, 0) ** 2 @ down.T
def leaves(h, up, down): raise SystemExit("enough")
def interrupts(h, up, down): raise KeyboardInterrupt
def nothing(h, up, down): return np.full_like(h, np.nan)
WRONG, HANGS, CRASHES, TALKS = ({"mlp": f} for f in (wrong, hangs, crashes, talks))
LEAVES, INTERRUPTS, NAN = ({"mlp": f} for f in (leaves, interrupts, nothing))
"""


def run(tmp_path, *args, expected: int):
    """Return stdout and stderr of the command, run in a folder with a user's module."""
    (tmp_path / "mine.py").write_text(MINE)
    line = [sys.executable, "-m", "refengine", "verify", *args]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_a_wrong_candidate_ends_with_1_and_with_the_line_that_reproduces_it(tmp_path):
    names = [word for name in ("mlp", "mlp-mixer", "logits") for word in ("--op", name)]
    out, _ = run(tmp_path, "--backend", "mine:WRONG", *names, expected=1)
    assert "not judged (mlp is wrong): mlp-mixer" in out and "logits  " in out
    again = out.rstrip().splitlines()[-1].strip()
    assert again.startswith("refengine verify --backend mine:WRONG --op mlp --seed 0 --case 'an_mlp_squares")
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}
    case = again.partition("--case ")[2].strip("'")
    out, _ = run(tmp_path, "--backend", "mine:WRONG", "--case", case, "--json", expected=1)
    row = json.loads(out)
    assert row["operation"] == "mlp" and row["verdict"] == "wrong" and row["reproduce"] == again
    run(tmp_path, "--case", case, expected=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, limit, said",
    [("HANGS", "15", "no answer within 15 seconds"), ("CRASHES", "60", "the process ended with ")],
)
def test_a_candidate_that_hangs_or_crashes_costs_its_row_only(tmp_path, name, limit, said):
    how = ["--backend", f"mine:{name}", "--op", "mlp", "--op", "all_reduce", "--limit", limit, "--json"]
    out, _ = run(tmp_path, *how, expected=1)
    first, second = map(json.loads, out.splitlines())
    assert (
        first["verdict"] == "wrong" and said in first["why"] and first["why"].startswith("recorded case mlp/")
    )
    assert second["verdict"] == "pass"


def test_what_a_candidate_prints_is_not_in_the_report(tmp_path):
    out, err = run(tmp_path, "--backend", "mine:TALKS", "--op", "mlp", "--json", expected=0)
    assert json.loads(out)["verdict"] == "pass" and "a line of the candidate" in err


@pytest.mark.parametrize(
    "args, said",
    [
        (["--backend", "nothing"], "there is no backend 'nothing'"),
        (["--op", "nothing"], "there is no operation 'nothing'"),
        (["--backend", ":"], "':' names no module"),
        (["--prefill-decode", "tiny", "--tokens", "99999"], "are more than the model's context of"),
        (["--case", "nothing"], "is not CHECK(name=value, ...)"),
        (
            ["--backend", "numpy", "--dtype", "bf16", "--op", "mlp"],
            "the numpy backend computes in float32 or",
        ),
    ],
)
def test_a_mistaken_command_ends_with_a_sentence(tmp_path, args, said):
    out, err = run(tmp_path, *args, expected=1)
    assert said in err and len(err.splitlines()) == 1 and not out


@pytest.mark.parametrize(
    "name, said",
    [
        ("LEAVES", "mlp raised SystemExit: enough"),
        ("INTERRUPTS", "mlp raised KeyboardInterrupt"),
        ("NAN", "NaN"),
    ],
)
def test_a_candidate_that_ends_its_process_or_returns_nan_is_a_row(tmp_path, name, said):
    out, _ = run(tmp_path, "--backend", f"mine:{name}", "--op", "mlp", "--json", expected=1)
    row = json.loads(out)
    assert row["verdict"] == "wrong" and said in row["why"] and not row["as_if"]


@pytest.mark.parametrize(
    "statement", ["raise SystemExit(3)", "raise KeyboardInterrupt", "import sys; sys.exit()"]
)
def test_a_file_that_ends_its_process_is_a_sentence_with_its_name(tmp_path, statement):
    (tmp_path / "ends.py").write_text(statement)
    out, err = run(tmp_path, "--backend", "ends.py", "--op", "mlp", expected=1)
    assert not out and "ends.py" in err and len(err.splitlines()) == 1
    assert "SystemExit" in err or "KeyboardInterrupt" in err


MISSPELT = """
from refengine.spec.norm import rms_norm
def gated_rmsnorm(y, z, weight, eps, groups): return y
"""


def test_a_misspelt_verb_is_named_with_the_right_one(tmp_path):
    (tmp_path / "near.py").write_text(MISSPELT + "def mlp(h, up, down): return h")
    out, err = run(tmp_path, "--backend", "near.py", "--op", "mlp", expected=1)
    assert out.startswith("near.py, float32; yours: mlp\n")
    assert "no verb and not checked: gated_rmsnorm (did you mean gated_rms_norm?)" in err


def test_a_file_without_any_verb_is_refused(tmp_path):
    (tmp_path / "none.py").write_text(MISSPELT)
    out, err = run(tmp_path, "--backend", "none.py", expected=1)
    assert not out and "has no function with the name of a verb" in err and len(err.splitlines()) == 1
    assert "gated_rmsnorm (did you mean gated_rms_norm?)" in err


def test_without_hypothesis_the_extra_is_named(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "hypothesis" else found(name, *a)
    )
    result = CliRunner().invoke(verify, ["--list"])
    assert str(result.exception) == "verify needs Hypothesis: pip install 'refengine[verify]'"


def test_the_list_names_every_operation_and_sentence():
    result = CliRunner().invoke(verify, ["--list"])
    assert result.exit_code == 0
    assert all(f"    {check.sentence}\n" in result.output for check in report.CHECKS)
    lines = CliRunner().invoke(verify, ["--list", "--json", "--op", "operations"]).output.splitlines()
    assert [json.loads(line)["operation"] for line in lines] == list(report.VERBS)


def test_prefill_is_decode_and_a_step_that_differs_is_seen():
    with refengine.load("tiny") as engine:
        found = prefill_decode.compare(engine, 12)
    assert 1 <= found.ratio <= found.worst_ratio < 1.0001 and found.kl < 1e-6
    assert found.top1 == 1 and found.repeats and found.tokens == 12

    def step(model, ids, states):
        h, states = model.blocks(model.embed(np.asarray(ids)[:, None]), states)
        return 1.1 * model.head(h)[:, 0], states

    with refengine.load("tiny", replace(numpy_backend(), step=step)) as engine:
        found = prefill_decode.compare(engine, 24)
    assert found.ratio > 1.01 and found.kl > 1e-5 and found.repeats


def test_steps_that_never_repeat_are_seen():
    rng = np.random.default_rng(0)

    def step(model, ids, states):
        h, states = model.blocks(model.embed(np.asarray(ids)[:, None]), states)
        logits = model.head(h)[:, 0]
        return logits + rng.normal(size=logits.shape).astype(np.float32) * 1e-3, states

    with refengine.load("tiny", replace(numpy_backend(), step=step)) as engine:
        assert not prefill_decode.compare(engine, 6).repeats
    from refengine.conformance.candidate import bench

    (row,) = report.report(bench("random", replace(numpy_backend(), step=step), "float32"), ["determinism"],
                           report.Plan(examples=3))  # fmt: skip
    assert row.verdict == "wrong" and "differ between two runs" in row.why


def test_prefill_decode_prints_its_figures(tmp_path):
    out, _ = run(tmp_path, "--prefill-decode", "tiny", "--tokens", "8", "--json", expected=0)
    found = json.loads(out)
    assert found["tokens"] == 8 and found["backend"] == "numpy"
    out, _ = run(tmp_path, "--prefill-decode", "tiny", "--tokens", "2", "--backend", "cpu", expected=0)
    assert out.startswith("tiny on cpu, ")
    _, err = run(tmp_path, "--prefill-decode", "tiny", "--op", "mlp", expected=2)
    assert "--op does not apply to --prefill-decode" in err
    _, err = run(tmp_path, "--prefill-decode", "tiny", "--backend", "mine:LEAVES", expected=1)
    assert "mine:LEAVES fails: Wrong: mlp raised SystemExit" in err

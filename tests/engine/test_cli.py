"""Each command line gives the intended result, or one sentence and the right exit code."""

import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import refengine.cli
import refengine.ranks.load
from refengine.cli.generate import generate
from refengine.generation import Options

REFENGINE = [sys.executable, "-m", "refengine"]


def piped(args, data: bytes = b""):
    """Return a finished command, run in a separate process with `data` on standard input."""
    done = subprocess.run([*REFENGINE, *args], input=data, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def cli(capsys, monkeypatch):
    """Return (exit code, stdout, stderr) of a command that runs in this process."""

    def call(*args):
        args = [str(arg) for arg in args]
        code, _ = refengine.cli.run(lambda: refengine.cli.command(args), "--debug" in args)
        return code, *capsys.readouterr()

    return call


def fails(result, code=1):
    """Check for one sentence on stderr, nothing on stdout, and no traceback."""
    got, out, err = result
    assert got == code and out == "" and "Traceback" not in err
    if code == 1:
        assert err.count("\n") == 1 and err.startswith("refengine: ")
    return err


def test_generate_prints_the_prompt_and_goes_on(cli):
    code, out, err = cli("generate", "Once upon a time", "-n", 20, "--seed", 1)
    assert code == 0 and out.startswith("Once upon a time") and len(out) > 30 and err == ""
    assert cli("generate", "Once upon a time", "-n", 20, "--seed", 1)[1] == out
    assert cli("generate", "Once upon a time", "-n", 20, "--seed", 1, "--no-echo")[1] == out[16:]


def test_the_readme_shows_what_the_program_prints(cli):
    """(In float64, where no rounding can turn one token into another.)"""
    readme = (Path(refengine.__file__).parent.parent / "README.md").read_text()
    command, quoted = re.search(r"refengine (generate [^\n]*)\n```\n\n((?:>.*\n)+)", readme).groups()
    shown = re.sub(r"^> ?", "", quoted, flags=re.M)
    assert cli(*shlex.split(command), "--dtype", "float64") == (0, shown, "")


def test_what_the_python_interface_may_be_told_the_command_may_too():
    options = {parameter.name for parameter in generate.params}
    assert set(inspect.signature(refengine.ranks.load.load).parameters) <= options
    assert set(Options.__dataclass_fields__) <= options


def test_a_prompt_may_come_from_a_file_or_standard_input(cli, tmp_path):
    (tmp_path / "prompt").write_text("Once upon a time")
    expected = cli("generate", "Once upon a time", "-n", 8, "-t", 0)[1]
    assert cli("generate", "--file", tmp_path / "prompt", "-n", 8, "-t", 0)[1] == expected
    assert piped(["generate", "-n", "8", "-t", "0"], b"Once upon a time")[1] == expected


def test_several_prompts_run_side_by_side_and_print_in_order(cli, tmp_path):
    (tmp_path / "prompts").write_text("Once upon a time\n\nOne day\n")
    code, out, _ = cli("generate", "--prompts", tmp_path / "prompts", "-n", 6, "-t", 0, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and sorted(record["prompt"] for record in records) == ["Once upon a time", "One day"]
    text = cli("generate", "--prompts", tmp_path / "prompts", "-n", 6, "-t", 0)[1]
    assert text.index("Once upon") < text.index("One day")


def test_only_line_ends_end_a_line_of_prompts(cli, tmp_path):
    (tmp_path / "prompts").write_text("Once upon\u2028a time\r\nOne\x0cday\n")
    _, out, _ = cli("generate", "--prompts", tmp_path / "prompts", "-n", 1, "--json")
    prompts = {json.loads(line)["prompt"] for line in out.strip().split("\n")}
    assert prompts == {"Once upon\u2028a time", "One\x0cday"}


def test_json_is_json_that_everyone_reads(cli, tmp_path):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    (tmp_path / "text").write_text("Once upon a time")
    for command in (["inspect", "tiny"], ["score", tmp_path / "text"], ["generate", "x", "-n", 1]):
        _, out, _ = cli(*command, "--json")
        json.loads(out, parse_constant=no_constant)


def test_json_holds_the_text_its_tokens_and_the_statistics(cli):
    _, out, _ = cli("generate", "Once", "-n", 5, "--json", "--logprobs", 2, "--ignore-eos", "--seed", 4)
    record = json.loads(out)
    assert record["prompt"] == "Once" and len(record["token_ids"]) == 5 == len(record["logprobs"])
    assert record["reason"] == "length" and record["statistics"]["seed"] == 4


def test_stats_go_to_stderr_in_one_line(cli):
    _, out, err = cli("generate", "Once", "-n", 5, "--stats", "--ignore-eos")
    assert "tokens/s" in err and err.count("\n") == 1 and "tokens/s" not in out


def test_logprobs_print_a_line_a_token(cli):
    _, out, _ = cli("generate", "Once", "-n", 4, "--logprobs", 2, "--ignore-eos")
    assert len(out.splitlines()) == 4


def test_inspect_says_what_a_model_is(cli):
    code, out, _ = cli("inspect", "tiny")
    words = ("pattern", "routed_expert", "active", "a sequence", "a token")
    assert code == 0 and all(word in out for word in words)
    facts = json.loads(cli("inspect", "tiny", "--json")[1])
    assert facts["bytes"] == sum(role["bytes"] for role in facts["roles"].values())


def test_score_gives_the_perplexity_of_a_text_by_the_model_and_by_its_head(cli, tmp_path):
    (tmp_path / "text").write_text("Once upon a time, there was a little girl.")
    code, out, _ = cli("score", tmp_path / "text")
    assert code == 0 and "perplexity" in out and "prediction head" in out
    result = json.loads(cli("score", tmp_path / "text", "--json")[1])
    assert result["model"]["scored"] == result["tokens"] - 1 == result["prediction_head"]["scored"] + 1


def test_chat_answers_a_message_and_a_conversation(cli):
    code, out, _ = cli("chat", "Hi", "-n", 12, "--json", "--no-thinking")
    assert code == 0 and json.loads(out)["role"] == "assistant"
    code, out, _ = piped(["chat", "-n", "5", "--json"], b"Hi\nBye\n")
    assert code == 0 and len(out.splitlines()) == 2


def test_a_piped_chat_answers_a_line_before_it_reads_the_next():
    process = subprocess.Popen(
        [*REFENGINE, "chat", "-n", "3", "--json"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for line in (b"Hi\n", b"Bye\n"):
        process.stdin.write(line)
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["role"] == "assistant"
    process.stdin.close()
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "x", "--temperature", "-1"],
        ["generate", "x", "--top-p", "0"],
        ["generate", "x", "--min-p", "2"],
        ["generate", "x", "--max-tokens", "-1"],
        ["generate", "x", "--threads", "0"],
        ["generate", "x", "--file", "y"],
        ["generate", "x", "--top-k", "many"],
        ["generate", "--colour"],
        ["degenerate"],
        ["score"],
        ["generate", "x", "--temperature", "nan"],
        ["generate", "x", "--repetition-penalty", "inf"],
        ["generate", "x", "--stop", ""],
        ["generate", "x", "--backend", "abacus"],
        ["generate", "x", "--dtype", "int3"],
    ],
)
def test_a_wrong_command_ends_with_2(cli, args):
    fails(cli(*args), code=2)


def test_help_and_version_are_there(cli):
    assert cli("--version")[1].startswith("refengine ")
    for command in ([], ["generate"], ["chat"], ["inspect"], ["score"]):
        code, out, _ = cli(*command, "--help")
        assert code == 0 and len(out.splitlines()) < 50


@pytest.mark.parametrize("prompt, says", [(b"", "empty"), (b"\xff\xfe", "UTF-8")])
def test_a_prompt_that_is_empty_or_not_text_is_one_sentence(prompt, says):
    assert says in fails(piped(["generate"], prompt))
    assert says in fails(piped(["generate", prompt]))


def test_models_that_are_not_there_are_one_sentence(cli, tmp_path):
    hub = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    assert "hf download" in fails(cli("generate", "x", "--model", hub))
    fails(cli("generate", "x", "--model", tmp_path))
    fails(cli("inspect", tmp_path / "nothing"))
    fails(cli("score", tmp_path / "nothing"))
    fails(cli("generate", "--file", tmp_path / "nothing"))


def test_an_error_of_our_own_is_one_sentence_and_its_traceback_is_for_debug(cli, monkeypatch):
    monkeypatch.setattr("refengine.load", lambda *a, **k: 1 / 0)
    assert "--debug" in fails(cli("generate", "x"))
    code, _, err = cli("generate", "x", "--debug")
    assert code == 1 and "Traceback" in err and "ZeroDivisionError" in err


def test_closed_streams_are_no_traceback():
    for command in ("generate Once -n 3 >&-", "chat Hi -n 3 >&-"):
        done = subprocess.run(f"{' '.join(REFENGINE)} {command}", shell=True, capture_output=True)
        assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0)
    done = subprocess.run(f"{' '.join(REFENGINE)} generate <&-", shell=True, capture_output=True)
    fails((done.returncode, done.stdout.decode(), done.stderr.decode()))


def test_whoever_reads_our_output_may_leave():
    command = f"{' '.join(REFENGINE)} generate x -n 400 --ignore-eos | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(command, shell=True, executable="/bin/bash", capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_ends_with_130_and_says_nothing():
    process = subprocess.Popen(
        [*REFENGINE, "generate", "x", "-n", "100000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(5)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(120) == 130  # generous: the machine may be busy
    assert b"Traceback" not in process.stderr.read()


def test_lines_of_json_carry_their_own_options(cli, tmp_path):
    lines = [
        {"prompt": "Once upon a time", "max_tokens": 3},
        {"prompt": [501, 276], "max_tokens": 2, "temperature": 0.0},
        {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 1},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, err = cli("generate", "--prompts", tmp_path / "p.jsonl", "-t", 0, "--ignore-eos", "--json")
    found = {record["index"]: record for record in map(json.loads, out.splitlines())}
    assert code == 0 and [len(found[i]["token_ids"]) for i in range(3)] == [3, 2, 1], err
    assert found[1]["prompt_token_ids"] == [501, 276] and found[2]["messages"] == lines[2]["messages"]


@pytest.mark.parametrize(
    "line, says",
    [
        ("[1]", "line 2 of .*p.jsonl is not an object"),
        ("{", "line 2 of .*p.jsonl is not valid JSON"),
        ('{"prompt": "a", "messages": []}', "either"),
        ('{"prompt": "a", "temprature": 1}', "line 2 of .* has 'temprature', which is not an option"),
        ('{"prompt": "a", "temperature": "hot"}', "prompt 1: temperature = 'hot' is not a number"),
        ('{"prompt": 5}', "prompt 1: the prompt is of type int"),
        ('{"prompt": null}', "prompt 1: the prompt is None"),
    ],
)
def test_a_bad_line_of_json_is_named(cli, tmp_path, line, says):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once"}\n' + line)
    code, _, err = cli("generate", "--prompts", tmp_path / "p.jsonl", "-n", 1)
    assert code == 1 and re.search(says, err) and err.count("\n") == 1


def test_a_bad_line_stops_no_other(cli, tmp_path):
    lines = ['{"prompt": "Once"}', "{", '{"prompt": ""}', '{"prompt": "One", "max_tokens": 2}', "[1]"]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    how = ("generate", "--prompts", tmp_path / "p.jsonl", "-n", 1, "-t", 0, "--ignore-eos")
    code, out, err = cli(*how, "--json")
    found = {record["index"]: record for record in map(json.loads, out.splitlines())}
    assert code == 1 and [len(found[i]["token_ids"]) for i in (0, 3)] == [1, 2]
    assert [re.sub("^.*p.jsonl", "", found[i]["error"])[:15] for i in (1, 2, 4)] == [
        " is not valid J",
        "the prompt is e",
        " is not an obje",
    ]
    assert [line[:19] for line in err.splitlines()] == [f"refengine: prompt {i}" for i in (1, 2, 4)]
    code, out, again = cli(*how, "--stats")
    assert code == 1 and [line for line in out.splitlines() if line.startswith("==>")] == [
        f"==> {i} of 5 <==" for i in range(1, 6)
    ]
    assert "Once" in out and "One" in out and "all 2: prompts of " in again
    assert cli(*how, "--logprobs", 1)[0] == 1

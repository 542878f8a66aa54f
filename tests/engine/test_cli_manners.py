"""The command line has notes, environment variables, hints, delimiters, ids, versions and completion."""

import contextlib
import json
import os
import shutil
import signal
import subprocess

import click
import pytest

import refengine
from refengine.backend import automatic
from refengine.checkpoint import Checkpoint
from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import write
from refengine.cli import cli as group
from refengine.cli import hints
from refengine.cli.options import dtype_of
from refengine.conformance.cases import Case
from refengine.ranks.load import load as load_rank
from tests.engine.test_cli import REFENGINE, cli, fails, piped  # noqa: F401
from tests.support.vocabularies import TINY

pytestmark = pytest.mark.slow


def test_several_texts_have_a_labelled_delimiter_and_are_in_order(cli, tmp_path):  # noqa: F811
    (tmp_path / "prompts").write_text("Once upon a time\nOne\nOnce\n")
    _, out, _ = cli("generate", "--prompts", tmp_path / "prompts", "-n", 5, "-t", 0)
    lines = out.splitlines()
    at = [lines.index(f"==> {i} of 3 <==") for i in (1, 2, 3)]
    assert at == sorted(at) and [lines[i + 1][:3] for i in at] == ["Onc", "One", "Onc"]
    assert "==>" not in cli("generate", "Once", "-n", 5, "-t", 0)[1]


def test_token_ids_are_a_prompt(cli):  # noqa: F811
    record = json.loads(cli("generate", "--ids", "10, 25 99", "-n", 3, "-t", 0, "--json")[1])
    assert record["prompt_token_ids"] == [10, 25, 99] and len(record["token_ids"]) == 3
    assert "'x' is not a token id" in fails(cli("generate", "--ids", "10 x"))
    assert "token id 99999 is not in the vocabulary" in fails(cli("generate", "--ids", "99999"))


def test_a_model_without_a_tokenizer_generates_from_and_to_ids(cli, tmp_path):  # noqa: F811
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path)
    how = ("-m", tmp_path, "-t", 0, "-n", 4)
    ids = json.loads(cli("generate", "--ids", "10 25", *how, "--json")[1])["token_ids"]
    code, out, err = cli("generate", "--ids", "10 25", *how)
    assert (code, out) == (0, f"10 25 {' '.join(map(str, ids))}\n")
    assert err.startswith("note: ") and "copy the tokenizer.json of the model" in err
    assert cli("generate", "--ids", "10 25", *how, "--quiet")[2] == ""
    assert '--ids "10 25 99"' in fails(cli("generate", "Once", *how))


def test_a_model_without_a_tokenizer_serves_ids_in_python_too(tmp_path):
    """End tokens and sampling defaults come from the other files."""
    for name in ("config.json", "model.safetensors", "generation_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, tmp_path)
    ours, whole = refengine.load(tmp_path), refengine.load("tiny")
    how = {"max_tokens": 6, "seed": 3}
    expected = [event.id for event in list(whole.generate([10, 25], **how))[:-1]]
    *tokens, end = ours.generate([10, 25], **how)
    assert [token.id for token in tokens] == expected and end.reason == "length"
    assert ours.tokenizer.stop_ids == whole.tokenizer.stop_ids
    assert ours.tokenizer.generation == whole.tokenizer.generation
    assert ours.score([10, 25, 99]).trunk == whole.score([10, 25, 99]).trunk
    for prompt in ("Once", [{"role": "user", "content": "Hi"}]):
        with pytest.raises(refengine.InputError, match=r"tokenizer\.json does not exist: give token ids"):
            ours.complete(prompt)


def test_notes_of_a_checkpoint_reach_every_command_once(cli, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(TINY, tmp_path / "m", ignore=shutil.ignore_patterns("*.md"))
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"a_key_of_the_future": 1}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "text").write_text("Once upon a time")
    monkeypatch.setenv("REFENGINE_MODEL", str(tmp_path / "m"))
    for command in (
        ["generate", "x", "-n", 1],
        ["chat", "x", "-n", 1, "--json"],
        ["score", tmp_path / "text"],
    ):
        _, _, err = cli(*command)
        if err:  # where the checkpoint has a note of it
            assert err.startswith("note: ") and err.count("a_key_of_the_future") == 1
        assert cli(*command, "-q")[2] == ""
    assert "note " in cli("inspect")[1] and "note " not in cli("inspect", "--quiet")[1]
    (tmp_path / "m" / "generation_config.json").write_text("{,}")
    assert cli("tokenize", "x")[2].startswith("note: ") and cli("tokenize", "x", "--quiet")[2] == ""


def test_verbose_says_what_is_loaded(cli):  # noqa: F811
    err = cli("generate", "x", "-n", 1, "--verbose", "--backend", "numpy")[2]
    assert "8.6 MB of weights" in err and "backend numpy, dtype float32" in err


def test_every_option_has_one_environment_variable(cli, monkeypatch):  # noqa: F811
    for name in group.list_commands(None):
        for param in group.get_command(None, name).params:
            if isinstance(param, click.Option):
                assert param.envvar, (name, param.name)
    monkeypatch.setenv("REFENGINE_MAX_TOKENS", "3")
    monkeypatch.setenv("REFENGINE_JSON", "1")
    monkeypatch.setenv("REFENGINE_IGNORE_EOS", "1")
    assert len(json.loads(cli("generate", "x")[1])["token_ids"]) == 3
    monkeypatch.setenv("REFENGINE_MODEL", "nowhere")
    assert "nowhere" in fails(cli("chat", "x"))


def test_a_byte_order_mark_is_no_part_of_a_prompt(cli, tmp_path):  # noqa: F811
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfOnce")
    assert json.loads(cli("generate", "-f", tmp_path / "prompt", "-n", 1, "--json")[1])["prompt"] == "Once"


@pytest.mark.parametrize(
    "args, says",
    [
        (["generate", "x", "--max-new-tokens", "3"], "-n/--max-tokens N"),
        (["generate", "x", "--n-predict=3"], "-n/--max-tokens N"),
        (["generate", "x", "-ngl", "99"], "--backend cuda"),
        (["generate", "x", "--temp", "0"], "--temperature T"),
        (["generate", "x", "--repeat-penalty", "1"], "--repetition-penalty R"),
        (["generate", "x", "--tensor-parallel-size", "2"], "--tp N"),
        (["generate", "x", "--ctx-size", "99"], "There is none here: the context is the model's own"),
        (["chat", "x", "--think"], "--thinking on|off"),
        (["run", "x"], "chat (to talk)"),
        (["serve"], "there is no server yet"),
        (["pull", "x"], "hf download"),
    ],
)
def test_names_of_other_engines_lead_to_ours(cli, args, says):  # noqa: F811
    assert says in fails(cli(*args), code=2)


def test_hints_name_no_option_that_a_command_has():
    own = {
        opt
        for name in group.list_commands(None)
        for p in group.get_command(None, name).params
        for opt in p.opts
    }
    assert not own & hints.OF_OPTION.keys()
    assert not set(group.list_commands(None)) & hints.COMMANDS.keys()


def test_dtypes_have_short_names_and_auto(cli):  # noqa: F811
    exact = cli("generate", "Once", "-n", 5, "-t", 0, "--dtype", "float64")
    assert cli("generate", "Once", "-n", 5, "-t", 0, "--dtype", "f64") == exact
    assert dtype_of(str(TINY), "numpy") == "float32" and dtype_of(str(TINY), "torch") == "bfloat16"


@pytest.mark.parametrize("disk, auto", [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_auto_is_one_rule_in_python_and_on_the_command_line(disk, auto, tmp_path):
    cfg = Case(layers="M*E-").cfg
    write(tmp_path, cfg, random_values(cfg), dtype=disk)
    assert dtype_of(str(tmp_path), "torch") == auto == Checkpoint.open(tmp_path).auto_dtype("torch")
    for load in (refengine.load, load_rank):
        with load(tmp_path, dtype="auto") as engine:
            head = engine.model.weights[""]["lm_head.weight"]
            assert head.dtype == "float32" == dtype_of(str(tmp_path), "numpy")


@pytest.mark.parametrize("found", ["numpy", "torch", "cpu"])
def test_auto_means_the_dtype_of_the_backend_that_auto_means(found, monkeypatch):
    """Also if there is only NumPy, which has no bfloat16."""
    monkeypatch.setattr("refengine.backend.find_spec", lambda name: name == "torch" and found == "torch")
    monkeypatch.setattr("refengine.backends.cpu.native.load", lambda: found == "cpu")
    if found == "torch":
        pytest.importorskip("torch")
    assert automatic(None, "auto") == automatic("cpu", "auto", ranks=2)
    assert automatic(None, "auto")[0] == found
    if found != "cpu":  # (whose library is not here)
        engine = refengine.load("tiny", backend="auto", dtype="auto")
        assert engine.complete("Once", max_tokens=1)


def test_the_version_names_what_refengine_runs_on(cli):  # noqa: F811
    code, out, _ = cli("--version")
    first, *rows = out.splitlines()
    assert code == 0 and first.startswith("refengine ")
    assert [row.split()[0] for row in rows] == ["python", "numpy", "compiler", "backends", "auto"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(cli, shell):  # noqa: F811
    assert "_REFENGINE_COMPLETE" in cli("completion", shell)[1]
    asked = {
        "_REFENGINE_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "refengine generate --max",
        "COMP_CWORD": "2",
    }
    if shell == "fish":
        asked["COMP_CWORD"] = "--max"
    done = subprocess.run(REFENGINE, env=os.environ | asked, capture_output=True, text=True)
    assert "--max-tokens" in done.stdout and done.returncode == 0


@pytest.mark.parametrize(
    "words, kinds",
    [
        ("generate --file ", {"file"}),
        ("generate --prompts ", {"file"}),
        ("tokenize -f ", {"file"}),
        ("score ", {"file"}),
        ("chat --messages ", {"file"}),
        ("chat --tools ", {"file"}),
        ("chat --template ", {"file"}),
        ("chat --model ", {"file", "tiny", "nvidia/a-model"}),
        ("chat -m n", {"file", "nvidia/a-model"}),
        ("inspect ", {"file", "tiny", "nvidia/a-model"}),
    ],
)
def test_a_shell_completes_names_of_files_and_models(words, kinds, tmp_path, monkeypatch, capsys):
    (tmp_path / "models--nvidia--a-model" / "snapshots").mkdir(parents=True)
    (tmp_path / "datasets--nvidia--a-set" / "snapshots").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("_REFENGINE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"refengine {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" "))))
    with contextlib.suppress(SystemExit, click.exceptions.Exit):
        refengine.cli.complete([])
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert {name if kind == "plain" else kind for kind, name in rows} == kinds


def test_tokenize_prints_ids_and_texts(cli, tmp_path):  # noqa: F811
    record = json.loads(cli("tokenize", "Once upon a time", "--json")[1])
    ids = " ".join(map(str, record["token_ids"]))
    assert (
        "".join(record["tokens"]) == "Once upon a time"
        and cli("tokenize", "--ids", ids)[1] == "Once upon a time\n"
    )
    assert cli("tokenize", "-p", "Once upon a time", "--count")[1] == f"{len(record['token_ids'])}\n"
    assert len(cli("tokenize", "Once upon a time")[1].splitlines()) == len(record["token_ids"])
    (tmp_path / "text").write_text("Once upon a time")
    assert json.loads(cli("tokenize", "-f", tmp_path / "text", "--json")[1]) == record
    assert json.loads(piped(["tokenize", "--json"], b"Once upon a time")[1]) == record
    assert "no token with the id 99999" in fails(cli("tokenize", "--ids", "99999"))
    fails(cli("tokenize", "x", "--ids", "1"), code=2)


def test_an_interrupted_run_prints_the_json_it_has():
    command = [
        *REFENGINE,
        "generate",
        "x",
        "-n",
        "100000",
        "--ignore-eos",
        "--json",
        "-t",
        "0",
        "--stop",
        "zzzz",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(6)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in err
    if out:  # the machine was quick enough to begin
        assert json.loads(out)["reason"] == "interrupted" and json.loads(out)["token_ids"]


def test_score_shows_how_far_it_is(tmp_path):
    """The progress bar counts every token of the text, and does not change the scores."""
    engine = refengine.load("tiny")
    text = "Once upon a time. " * 110
    counts = []

    class Bar(contextlib.nullcontext):
        def __enter__(self):
            return self

        def update(self, count):
            counts.append(count)

    expected = engine.score(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refengine.runner.progress", lambda *how: Bar())
        assert engine.score(text) == expected
    assert len(counts) > 1 and sum(counts) == len(expected.ids)
    assert engine.score(text) == expected and sum(counts) == len(expected.ids)


def test_a_dtype_that_numpy_lacks_names_the_backend_that_has_it(cli):  # noqa: F811
    assert "not in bfloat16; --backend torch does" in fails(
        cli("generate", "x", "--backend", "numpy", "--dtype", "bf16")
    )


def test_what_is_typed_goes_before_a_variable_of_another_source(cli, monkeypatch):  # noqa: F811
    plain = cli("generate", "Once", "-n", 3, "-t", 0)
    monkeypatch.setenv("REFENGINE_PROMPT", "Hello")
    monkeypatch.setenv("REFENGINE_DEBUG", "0")
    assert cli("generate", "Once", "-n", 3, "-t", 0) == plain
    assert cli("tokenize", "--ids", "5 6 7", "--count")[1] == "3\n"


def test_a_variable_holds_one_stop_string_a_line(cli, monkeypatch):  # noqa: F811
    whole = cli("generate", "Once upon", "-n", 9, "-t", 0)[1]
    monkeypatch.setenv("REFENGINE_STOP", "a time")
    assert whole.startswith("Once upon a time")
    assert cli("generate", "Once upon", "-n", 9, "-t", 0)[1] == "Once upon \n"

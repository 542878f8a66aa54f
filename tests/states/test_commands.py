"""States on the command line: --save-state, --load-state, chat --state, --cache, state show."""

import json
import os

import pytest

from refengine.states.state import State
from tests.engine.test_cli import cli, fails  # noqa: F401
from tests.ranks.test_processes import printed
from tests.support.processes import mpiexec

TEXT = "Once upon a time"
SEEDED = ("--seed", 3, "--ignore-eos")


def test_a_text_is_saved_and_goes_on(cli, tmp_path):  # noqa: F811
    """With a prompt, reading continues; without one, the text continues, on another backend too."""
    whole = cli("generate", TEXT, "-n", 20, *SEEDED)[1]
    code, first, err = cli("generate", TEXT, "-n", 8, *SEEDED, "--save-state", tmp_path / "f")
    assert (code, err) == (0, "") and whole.startswith(first.rstrip("\n"))
    for backend in ("numpy", "cpu"):
        how = ("--load-state", tmp_path / "f", "-n", 12, "--ignore-eos", "--backend", backend)
        assert first.rstrip("\n") + cli("generate", *how)[1] == whole
    code, out, err = cli("generate", " there", *how, "--stats", "--save-state", tmp_path / "f")
    assert code == 0 and out.startswith(" there") and "of them reused" in err
    record = json.loads(cli("generate", *how, "--json")[1])
    assert record["prompt"] == "" and len(record["token_ids"]) == 12
    assert os.listdir(tmp_path) == ["f"]


def test_a_state_is_shown(cli, tmp_path):  # noqa: F811
    cli(
        "generate",
        TEXT,
        "-n",
        8,
        "--seed",
        3,
        "-t",
        0.5,
        "--save-state",
        tmp_path / "f",
        "--backend",
        "numpy",
    )
    code, out, err = cli("state", "show", tmp_path / "f")
    assert (code, err) == (0, "") and "model        tiny, fingerprint " in out
    assert "temperature 0.5" in out and "seed 3" in out and "float32" in out
    found, state = json.loads(cli("state", "show", tmp_path / "f", "--json")[1]), State.load(tmp_path / "f")
    assert (found["tokens"], found["position"]) == (len(state.ids), state.position)
    assert sum(part["bytes"] for part in found["arrays"].values()) == state.nbytes
    assert found["talk"] is False and found["generator"] is True


def test_what_cannot_be_saved_or_read_is_a_sentence(cli, tmp_path):  # noqa: F811
    (tmp_path / "hello").write_text("hello")
    assert "is not a saved state" in fails(cli("state", "show", tmp_path / "hello"))
    assert "does not exist" in fails(cli("state", "show", tmp_path / "nothing"))
    assert "is not a saved state" in fails(cli("generate", "--load-state", tmp_path / "hello"))
    assert "is not a saved state" in fails(cli("chat", "Hi", "--state", tmp_path / "hello"))
    for command in (["generate", "x", "--save-state"], ["chat", "x", "--state"]):
        assert "is not a directory" in fails(cli(*command, tmp_path / "nowhere" / "f"))
        assert "it is a directory" in fails(cli(*command, tmp_path))
        assert "the name of the file is empty" in fails(cli(*command, ""))
    cli("generate", TEXT, "-n", 1, "--save-state", tmp_path / "text")
    assert "is the state of a text, not of a conversation" in fails(
        cli("chat", "x", "--state", tmp_path / "text")
    )
    fails(cli("generate", "--prompts", tmp_path / "hello", "--save-state", tmp_path / "f"), code=2)
    for wrong in ("2GiBs", "-1", "much", "1e9", ""):
        assert "is not a number of bytes" in fails(cli("generate", "x", "--cache", wrong), code=2)


def test_units_of_bytes():
    from refengine.cli.options import Bytes

    for text, value in {
        "0": 0,
        "12": 12,
        "2GiB": 2**31,
        "500MB": 5 * 10**8,
        "1.5k": 1500,
        "3 tib": 3 * 2**40,
    }.items():
        assert Bytes().convert(text, None, None) == value


def test_a_cache_reads_a_shared_beginning_once(cli, tmp_path):  # noqa: F811
    (tmp_path / "prompts").write_text("\n".join(f"{TEXT * 150} number {i}" for i in range(3)))
    how = ("generate", "--prompts", tmp_path / "prompts", "-n", 3, "-t", 0, "--batch", 1, "--json")
    lines = [json.loads(line) for line in cli(*how, "--cache", "64MiB")[1].splitlines()]
    plain = [json.loads(line) for line in cli(*how)[1].splitlines()]
    assert [line["token_ids"] for line in lines] == [line["token_ids"] for line in plain]
    reused = [line["statistics"]["reused_tokens"] for line in lines]
    assert reused[0] == 0 and reused[1] == reused[2] == 512
    assert all(line["statistics"]["reused_tokens"] == 0 for line in plain)


def test_a_talk_goes_on_days_later_on_another_backend(cli, tmp_path):  # noqa: F811
    how = ("-n", 12, "-t", 0, "--state", tmp_path / "talk", "--stats")
    code, _, err = cli("chat", "Tell me a story about a cat.", *how, "--backend", "numpy")
    assert code == 0 and "reused" not in err
    first = State.load(tmp_path / "talk")
    for turn, backend in enumerate(("cpu", "numpy"), 2):
        code, out, err = cli("chat", "And then?", *how, "--backend", backend, "--json")
        assert code == 0
        statistics = json.loads(out)["statistics"]
        assert statistics["reused_tokens"] >= first.position
        first = State.load(tmp_path / "talk")
        roles = [message["role"] for message in json.loads(first.talk["conversation"])]
        assert roles == ["user", "assistant"] * turn
    assert "talk         the messages" in cli("state", "show", tmp_path / "talk")[1]
    assert "give only one of" in fails(cli("chat", "x", *how, "--messages", tmp_path / "m"), code=2)


@pytest.mark.slow
def test_a_text_goes_on_over_ranks_and_back(cli, tmp_path):  # noqa: F811
    whole = cli("generate", TEXT, "-n", 16, "-t", 0, "--ignore-eos", "--dtype", "float64")[1]
    how = ("-t", 0, "--ignore-eos", "--dtype", "float64")
    text = printed(mpiexec(2, "generate", TEXT, "-n", 6, *how, "--tp", 2, "--save-state", tmp_path / "f"))
    again = ("--load-state", tmp_path / "f", "--save-state", tmp_path / "f")
    text = text.rstrip("\n") + cli("generate", "-n", 5, *how, *again)[1]
    text = text.rstrip("\n") + printed(mpiexec(2, "generate", "-n", 5, *how, "--pp", 2, *again))
    assert text == whole


def test_a_directory_of_prefixes_without_a_size_is_named_by_its_options(cli, tmp_path):  # noqa: F811
    assert "--cache 2GiB" in fails(cli("generate", "x", "--cache-dir", tmp_path), code=2)

"""Every number and text that a command prints equals that of the engine, field by field."""

import json
import math

import numpy as np
import pytest

import refengine
import refengine.cli

pytestmark = pytest.mark.slow

EXACT = ("--dtype", "float64")
TEXT = "Once upon a time, there was a little girl. One day she found\n a caf\u00e9 \u2014 and 12 cats.\n"
PROMPTS = ["Once upon a time", "The  cat ", "12 little"]
HOW = ["--seed", "3", "-t", "0.9", "-n", "12", "--ignore-eos"]


@pytest.fixture
def cli(capsys):
    """Return the stdout of a command that runs in this process."""

    def call(*args) -> str:
        code, _ = refengine.cli.run(lambda: refengine.cli.command([str(arg) for arg in args]), False)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return call


@pytest.fixture(scope="module")
def engine():
    return refengine.load("tiny", dtype="float64")


def quoted(engine, token: int) -> str:
    return repr(engine.tokenizer.decode([token]))


def summed_up(printed: dict, logprobs: list[float]) -> None:
    """Check count, sum, mean and perplexity of log-probabilities."""
    mean = -math.fsum(logprobs) / len(logprobs)
    assert printed["scored"] == len(logprobs)
    assert printed["log_likelihood"] == pytest.approx(math.fsum(logprobs), abs=1e-9)
    assert printed["nats_per_token"] == pytest.approx(mean, abs=1e-9)
    assert printed["perplexity"] == pytest.approx(math.exp(mean), rel=1e-9)


def test_score_prints_what_the_engine_scores(cli, engine, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    scores = engine.score(TEXT)
    told = json.loads(cli("score", tmp_path / "text", "--json", "--tokens", *EXACT))
    assert told["token_ids"] == scores.ids == engine.tokenizer.encode(TEXT)
    assert np.allclose(told["logprobs"], scores.trunk, rtol=0, atol=1e-9)
    assert np.allclose(told["head_logprobs"], scores.head, rtol=0, atol=1e-9)
    summed_up(told["model"], scores.trunk)
    summed_up(told["prediction_head"], scores.head)
    *lines, count, trunk, head = cli("score", tmp_path / "text", "--tokens", *EXACT).splitlines()
    judged = zip(scores.ids[1:], scores.trunk, strict=True)  # the first token has nothing before it
    assert [line.split() for line in lines] == [f"{quoted(engine, t)} {p:.3f}".split() for t, p in judged]
    assert count == f"{len(scores.ids)} tokens, {len(TEXT.encode())} bytes"
    for line, logprobs in ((trunk, scores.trunk), (head, scores.head)):
        mean = -math.fsum(logprobs) / len(logprobs)
        for number in (f"{-mean * len(logprobs):.3f} over {len(logprobs)} tokens", f"{math.exp(mean):.3f}"):
            assert number in line


def events(engine, prompts, **options) -> list[list]:
    found = [[] for _ in prompts]
    for i, event in engine.generate_batch(prompts, seed=3, temperature=0.9, max_tokens=12, **options):
        found[i].append(event)
    return found


HELD = [" thezzz", " azzz", ".zzz", ",zzz", " wazzz"]  # stop strings of which whole tokens are beginnings


@pytest.mark.parametrize("n", [0, 3])
def test_generate_prints_every_event_of_the_engine(cli, engine, tmp_path, n):
    (tmp_path / "prompts").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    asked = ["generate", "--prompts", tmp_path / "prompts", *HOW, "--logprobs", n, *EXACT]
    asked += [word for stop in HELD for word in ("--stop", stop)]
    told = {line["index"]: line for line in map(json.loads, cli(*asked, "--json").splitlines())}
    found = events(engine, PROMPTS, ignore_eos=True, logprobs=n, stop=HELD)
    assert not all(event.text for each in found for event in each[:-1]), "a token is held back"
    printed = cli(*asked).splitlines()
    for i, (*tokens, end) in enumerate(found):
        assert told[i]["prompt"] == PROMPTS[i] and told[i]["reason"] == end.reason
        assert told[i]["token_ids"] == [token.id for token in tokens]
        assert told[i]["text"] == "".join(token.text for token in tokens) + end.text
        assert told[i]["statistics"]["new_tokens"] == len(tokens) == 12
        assert told[i]["statistics"]["prompt_tokens"] == len(engine.ids(PROMPTS[i]))
        assert told[i]["statistics"]["seed"] == 3 + i
        for line, token in zip(told[i]["logprobs"], tokens, strict=True):
            assert line["token_id"] == token.id and line["logprob"] == pytest.approx(token.logprob, abs=1e-9)
            top = [(each["token_id"], each["logprob"]) for each in line["top"]]
            assert [t for t, _ in top] == [t for t, _ in token.top] and len(top) == n
            assert np.allclose([p for _, p in top], [p for _, p in token.top], rtol=0, atol=1e-9)
        mine = [line.split() for line in printed if line.startswith(f"{i}  ")]
        expected = []
        for token in tokens:
            pairs = [(token.id, token.logprob), *token.top]
            expected.append(
                [str(i), *(word for t, p in pairs for word in f"{quoted(engine, t)} {p:.3f}".split())]
            )
        assert mine == expected


def test_a_text_is_printed_as_the_engine_gives_it_whatever_its_prompt_ends_with(cli, engine, tmp_path):
    """Only the last line end of a file is not part of the prompt; blanks before it are."""
    for prompt, end in (("The cat ", "\n"), ("The cat\t", "\r\n"), ("The cat\n", "\n"), ("The cat", "")):
        (tmp_path / "prompt").write_bytes((prompt + end).encode())
        [[*tokens, last]] = events(engine, [prompt], ignore_eos=True)
        text = "".join(token.text for token in tokens) + last.text
        assert cli("generate", "-f", tmp_path / "prompt", *HOW, *EXACT) == f"{prompt}{text}\n"
        assert cli("generate", "-f", tmp_path / "prompt", "--no-echo", *HOW, *EXACT) == f"{text}\n"


def test_tokenize_prints_the_ids_and_the_text_of_each(cli, engine, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    ids = engine.tokenizer.encode(TEXT)
    tokens = [engine.tokenizer.decode([i]) for i in ids]
    told = json.loads(cli("tokenize", "-f", tmp_path / "text", "--json"))
    assert told == {"text": TEXT, "token_ids": ids, "tokens": tokens}
    lines = cli("tokenize", "-f", tmp_path / "text").splitlines()
    assert lines == [f"{i:7} {token!r}" for i, token in zip(ids, tokens, strict=True)]
    given = ("--ids", " ".join(map(str, ids)))
    assert cli("tokenize", *given) == engine.tokenizer.decode(ids) + "\n"
    assert json.loads(cli("tokenize", *given, "--json")) == {
        "token_ids": ids,
        "text": engine.tokenizer.decode(ids),
    }
    for what in (("-f", tmp_path / "text"), given):
        assert cli("tokenize", *what, "--count") == f"{len(ids)}\n"
        assert json.loads(cli("tokenize", *what, "--count", "--json")) == {"count": len(ids)}

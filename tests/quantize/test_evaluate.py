"""A quantized copy is compared with its original on text: loss, KL and top-1."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

import refengine
from refengine.cli.quantize import quantize as command
from refengine.quantize import evaluate, quantize, recipe_of
from refengine.quantize.evaluate import MOST, differences, pieces
from refengine.quantize.texts import TEXTS
from refengine.spec.config import InputError
from tests.support.checkpoints import random_checkpoint
from tests.support.packed import CFG
from tools.write.quantize_texts import stories

SHORT = ["Once upon a time, there was a small fox.", "Mia had a kite."]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    out = tmp_path_factory.mktemp("copy") / "out"
    quantize("tiny", out, recipe_of("nvfp4"))
    return out


def softmax(x):
    largest = float(max(x))
    e = [math.exp(float(each) - largest) for each in x]
    total = sum(e)
    return [each / total for each in e]


def test_the_numbers_are_those_of_a_literal_computation(copy):
    """Token by token, with Python's numbers."""
    found = evaluate("tiny", copy, SHORT)
    losses, kl, same, count = [0.0, 0.0], 0.0, 0, 0
    with refengine.load("tiny") as before, refengine.load(copy) as after:
        for text in SHORT:
            ids = before.ids(text)
            rows = [engine.logits(ids) for engine in (before, after)]
            for at, following in enumerate(ids[1:]):
                p, q = (softmax(each[at]) for each in rows)
                losses[0] -= math.log(p[following])
                losses[1] -= math.log(q[following])
                kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                same += p.index(max(p)) == q.index(max(q))
                count += 1
    wanted = (losses[0] / count, losses[1] / count, kl / count, same / count)
    assert found["tokens"] == count
    assert [found[name] for name in ("loss_before", "loss_after", "kl", "top1")] == pytest.approx(
        wanted, rel=1e-4, abs=1e-6
    )
    assert found["kl"] > 0 and found["loss_before"] != found["loss_after"]


def test_a_model_is_as_good_as_itself():
    found = evaluate("tiny", "tiny", SHORT[1:])
    assert found["loss_before"] == found["loss_after"] and (found["kl"], found["top1"]) == (0, 1)


def test_differences_of_known_distributions():
    p, q = np.log([[0.5, 0.5 - 1e-9, 1e-9]]), np.log([[0.25, 0.5, 0.25]])
    losses = [-math.log(0.5), -math.log(0.25)]
    kl = 0.5 * math.log(2) + 0.5 * math.log(1)
    assert differences(p, q, np.array([0])) == pytest.approx([*losses, kl, 0], abs=1e-6)


def test_pieces_hold_tokens_of_one_text_and_are_not_too_many():
    assert pieces([[1, 2, 3, 4, 5], [6, 7]], 2) == [[1, 2], [3, 4], [5], [6, 7]]
    assert sum(map(len, pieces([[1] * 3000, [2] * 3000, [3]], 256))) == MOST


def test_the_stories_are_those_of_the_generator():
    assert list(TEXTS) == stories() and len(TEXTS) == 20


def run(*arguments):
    return CliRunner().invoke(command, [str(each) for each in arguments])


def test_the_command_prints_loss_kl_and_top_1(tmp_path):
    (tmp_path / "text").write_text(SHORT[0])
    done = run("tiny", tmp_path / "a", "--texts", tmp_path / "text")
    last = done.stdout.splitlines()[-1]
    assert done.exit_code == 0 and last.startswith("loss ") and "KL 0." in last and "top-1" in last
    done = run("tiny", tmp_path / "b", "--texts", tmp_path / "text", "--json")
    found = json.loads(done.stdout)["evaluation"]
    assert found == evaluate("tiny", tmp_path / "b", SHORT[:1])


def test_without_evaluation_only_errors_are_printed(tmp_path):
    done = run("tiny", tmp_path / "a", "--no-evaluate", "--json")
    assert "evaluation" not in json.loads(done.stdout) and not done.stderr


def test_a_model_without_a_tokenizer_is_written_with_a_note(tmp_path):
    model = random_checkpoint(tmp_path / "model", CFG)
    done = run(model, tmp_path / "out")
    assert done.exit_code == 0 and "note: not evaluated: " in done.stderr and (tmp_path / "out").is_dir()


def test_a_model_that_does_not_fit_is_written_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr("refengine.quantize.can_evaluate", lambda cfg: False)
    done = run("tiny", tmp_path / "out")
    assert done.exit_code == 0 and "half of the free memory" in done.stderr and "loss" not in done.stdout


def test_a_text_that_cannot_be_read_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, what in (("none", "cannot be read"), ("latin", "is not UTF-8 text")):
        done = run("tiny", tmp_path / "out", "--texts", tmp_path / name)
        assert done.exit_code and what in str(done.exception) and not (tmp_path / "out").exists()


def test_too_little_text_is_one_sentence(copy):
    with pytest.raises(InputError, match="fewer than two tokens"):
        evaluate("tiny", copy, [""])


@pytest.mark.slow
def test_the_copy_is_compared_with_the_model_that_was_read_wherever_it_lies(tmp_path, monkeypatch):
    """A new directory may have the name by which the original model was found."""
    monkeypatch.chdir(tmp_path)
    refused = run("tiny", "tiny", "--recipe", "nvfp4")
    assert refused.exit_code == 1 and "give another name" in str(refused.exception)
    assert not list(tmp_path.iterdir())  # nothing was written
    (tmp_path / "text").write_text(SHORT[0])
    done = run("tiny", "./tiny", "--recipe", "nvfp4", "--json", "--texts", "text")
    assert json.loads(done.stdout)["evaluation"]["kl"] > 1e-4

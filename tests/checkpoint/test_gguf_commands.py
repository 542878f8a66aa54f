"""Every command accepts a GGUF file as a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import refengine
from refengine.bench import bytes_a_step
from refengine.checkpoint import Checkpoint
from refengine.cli import COMMANDS, cli, loaded
from refengine.cli.bench import packed_bytes
from refengine.convert import convert
from tests.support.processes import mpiexec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Return the embedded model in two types."""
    folder = tmp_path_factory.mktemp("commands")
    for kind in ("bf16", "q8_0"):
        convert("tiny", folder / f"{kind}.gguf", kind)
    return {kind: folder / f"{kind}.gguf" for kind in ("bf16", "q8_0")}


def output(*args, **how) -> str:
    done = CliRunner().invoke(loaded(args[0]), [str(arg) for arg in args[1:]], **how)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_inspect_shows_types_and_bits(files):
    found = json.loads(output("inspect", files["q8_0"], "--json"))
    assert found["path"].endswith("q8_0.gguf") and found["pattern"] == "M*MEM*EME"
    assert set(found["dtypes"]) == {"Q8_0", "F32"}
    assert 8.5 < 8 * found["bytes"] / found["parameters"] < 9.5
    assert "Q8_0" in output("inspect", files["q8_0"])


def test_generate_score_and_tokenize_give_what_the_model_gives(files, tmp_path):
    (tmp_path / "text").write_text("Once upon a time")
    for command in (
        ("generate", "Once upon a time", "-n", 8, "-t", 0, "--backend", "numpy"),
        ("score", tmp_path / "text", "--backend", "numpy", "--json"),
        ("tokenize", "Once upon a time"),
    ):
        assert output(*command, "-m", files["bf16"]) == output(*command, "-m", "tiny")


def test_chat_renders_the_template_of_the_file(files):
    how = ("-n", 8, "-t", 0, "--backend", "numpy")
    asked = [output("chat", *how, "-m", each, input="hello\n") for each in (files["bf16"], "tiny")]
    assert asked[0] == asked[1]


def test_verify_reads_a_packed_file(files):
    assert output("verify", "--prefill-decode", files["q8_0"], "--tokens", 16)


def test_trace_records_the_same_values(files, tmp_path):
    made = []
    for name, model in (("a", files["bf16"]), ("b", "tiny")):
        path = tmp_path / f"{name}.safetensors"
        output("trace", model, "-p", "Once upon", "--backend", "numpy", "-o", path)
        made.append(load_file(path))
    assert made[0].keys() == made[1].keys()
    assert all(np.array_equal(a, made[1][name]) for name, a in made[0].items())


def test_quantize_refuses_a_file(files, tmp_path):
    done = CliRunner().invoke(cli, ["quantize", str(files["bf16"]), str(tmp_path / "out")])
    assert "GGUF" in str(done.exception) and not (tmp_path / "out").exists()


def test_convert_writes_a_file_and_compares_it_with_the_model(tmp_path):
    found = json.loads(output("convert", "tiny", tmp_path / "x.gguf", "--type", "q8_0", "--json"))
    assert set(found["bytes"]) == {"Q8_0", "F32"}
    assert found["evaluation"]["kl"] < 0.001 and found["evaluation"]["top1"] > 0.98
    assert "bits an element" in output("convert", "tiny", tmp_path / "y.gguf", "--no-evaluate")


def test_a_trace_and_a_state_belong_to_the_file(files):
    """The fingerprint is of bytes and sizes: a file has small tensors in F32, and another context."""
    made = [refengine.load(each, backend="numpy") for each in (files["bf16"], files["bf16"], "tiny")]
    ours, again, theirs = (engine.fingerprint for engine in made)
    assert ours == again != theirs


def test_a_bench_counts_packed_bytes(files):
    sizes = [
        bytes_a_step(checkpoint.config, 2, 2, 1, 4, packed_bytes(checkpoint, "cpu"))
        for checkpoint in (Checkpoint.open(files["q8_0"]), Checkpoint.open(files["bf16"]))
    ]
    assert 0.4 < sizes[0] / sizes[1] < 0.8
    assert not packed_bytes(Checkpoint.open(files["q8_0"]), "torch")


@pytest.mark.slow
def test_two_ranks_write_the_text_of_one_process(files):
    """With blocks of 32 columns, some of which lie across the cut between ranks."""
    how = ("generate", "Once upon a time", "-n", 24, "-t", 0, "--dtype", "float32", "--backend", "numpy")
    arguments = [*map(str, how), "-m", files["q8_0"]]
    job = mpiexec(2, *arguments, "--tp", 2)
    assert (job.code, job.left) == (0, ()), job.err
    assert job.out == output(*arguments)


def test_the_command_is_listed():
    assert "convert" in COMMANDS

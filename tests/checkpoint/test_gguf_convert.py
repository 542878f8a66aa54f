"""Check that files of `refengine convert` read back with the same numbers, ids and texts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import refengine
from refengine.checkpoint import Checkpoint
from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import write
from refengine.conformance.cases import Case
from refengine.convert import KINDS, convert
from refengine.spec.config import InputError
from refengine.text.chat_template import ChatTemplate
from refengine.text.tokenizer import Tokenizer
from tests.support.checkpoints import random_checkpoint
from tests.support.packed import CFG, all_in, packed_checkpoint
from tests.support.vocabularies import TINY, engine_of, file

pytestmark = pytest.mark.slow

IDS = [1, 30, 40, 50, 60, 70, 80, 90, 100, 40, 30]
STORY = "Once upon a time"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Return the embedded model in each type."""
    folder = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        convert("tiny", folder / f"{kind}.gguf", kind)
    return {kind: folder / f"{kind}.gguf" for kind in KINDS}


def logits(model, backend="numpy", **how) -> np.ndarray:
    with refengine.load(model, backend=backend, **how) as engine:
        return engine.logits(IDS)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_a_file_that_is_not_packed_gives_the_same_bits(kind, files):
    np.testing.assert_array_equal(logits(files[kind]), logits("tiny"))
    ours, theirs = (Checkpoint.open(each).config for each in (files[kind], "tiny"))
    ours, theirs = (cfg.to_hf() | {"eos_token_id": [], "pad_token_id": 0} for cfg in (ours, theirs))
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_packed_file_computes_what_its_matrices_compute(kind, files, tmp_path):
    checkpoint = Checkpoint.open(files[kind])

    def values(row):
        weight = checkpoint.read(row.name)
        return weight if isinstance(weight, np.ndarray) else weight.dequantize()

    write(tmp_path, checkpoint.config, values, dtype="F32")
    np.testing.assert_array_equal(logits(files[kind], dtype="float64"), logits(tmp_path, dtype="float64"))


@pytest.mark.parametrize("name", ["numpy", "cpu", pytest.param("torch", marks=pytest.mark.thorough)])
def test_a_story_from_a_file_is_the_story_of_the_model(name, files):
    def told(model) -> str:
        with refengine.load(model, backend=name) as engine:
            return engine.complete(STORY, max_tokens=20, temperature=0)

    assert told(files["bf16"]) == told("tiny")
    assert len(told(files["q8_0"])) > 20


def test_texts_and_advice_of_the_embedded_model_come_back(files):
    ours, theirs = Tokenizer.load(files["bf16"]), Tokenizer.load(TINY)
    assert (ours.stop_ids, ours.generation) == (theirs.stop_ids, theirs.generation)
    assert ours.hf.get_vocab() == theirs.hf.get_vocab() and ours.specials == theirs.specials
    for text in (STORY, "<|im_start|>user\nwhat?<|im_end|>\n", "Ä 12  x\r\n\n\tümlaut 漢字"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    chats = [ChatTemplate.load(each) for each in (files["bf16"], TINY)]
    said = [{"role": "user", "content": "hello"}]
    assert chats[0].render(said) == chats[1].render(said) and chats[0].tokens == chats[1].tokens


@pytest.mark.thorough
def test_the_real_vocabulary_comes_back(tmp_path):
    cfg = replace(Case(layers="M*").cfg, vocab_size=131072)
    directory = random_checkpoint(tmp_path / "model", cfg)
    (directory / "tokenizer.json").write_text(file("real"), encoding="utf-8")
    convert(directory, tmp_path / "real.gguf", "f32")
    ours, theirs = Tokenizer.load(tmp_path / "real.gguf"), engine_of("real")
    assert ours.hf.get_vocab() == theirs.hf.get_vocab()
    sources = [path.read_text(encoding="utf-8") for path in Path(refengine.__file__).parent.glob("*.py")]
    for text in [
        *sources,
        "<|im_start|>x<think>\n\n</think>",
        "Größe, 東京 2026; naïve\t\r\n  a",
        "\u0300e\u200d",
    ]:
        assert ours.encode(text) == theirs.encode(text)


def test_packed_weights_keep_their_codes_in_nvfp4(tmp_path):
    """From a directory in NVFP4, if rows are blocks of 64; the other matrices are packed again."""
    cfg = replace(CFG, layers="M*EM")
    directory = packed_checkpoint(tmp_path / "packed", all_in("NVFP4"), cfg)
    convert(directory, tmp_path / "out.gguf", "nvfp4")
    ours, theirs = Checkpoint.open(tmp_path / "out.gguf"), Checkpoint.open(directory)
    same = [
        name
        for name, at in theirs.stored.items()
        if at.dtype == "NVFP4" and ours.stored[name].dtype == "NVFP4"
    ]
    assert len(same) > 3
    for name in same:
        if theirs.read(name).block == 16:
            np.testing.assert_array_equal(ours.read(name).dequantize(), theirs.read(name).dequantize())


def test_a_file_is_converted_to_another_type(files, tmp_path):
    convert(files["bf16"], tmp_path / "again.gguf", "q8_0")
    assert (tmp_path / "again.gguf").stat().st_size == files["q8_0"].stat().st_size
    np.testing.assert_array_equal(logits(tmp_path / "again.gguf"), logits(files["q8_0"]))


@pytest.mark.parametrize(
    "layers, head, sentence",
    [
        ("ME-", "", "expert and MLP layers"),
        ("ME", "E", "prediction heads of"),
        ("M*", "-", "prediction heads of"),
    ],
)
def test_a_model_that_gguf_has_no_form_for_is_refused(layers, head, sentence, tmp_path):
    directory = random_checkpoint(tmp_path / "model", Case(layers=layers, mtp_layers=head).cfg)
    with pytest.raises(InputError, match=sentence):
        convert(directory, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "out, kind, sentence",
    [
        ("x.bin", "bf16", "end in .gguf"),
        ("x.gguf", "q4_k", "give one of"),
        ("no/x.gguf", "f32", "not a directory"),
    ],
)
def test_a_wrong_target_is_refused(out, kind, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        convert("tiny", tmp_path / out, kind)


def test_a_file_is_never_overwritten(files):
    with pytest.raises(InputError, match="exists"):
        convert("tiny", files["f32"])


def test_a_model_without_a_tokenizer_is_converted_for_ids(tmp_path):
    directory = random_checkpoint(tmp_path / "model", CFG_DENSE := Case(layers="M-*").cfg)
    convert(directory, tmp_path / "x.gguf", "f32")
    ours = Checkpoint.open(tmp_path / "x.gguf")
    assert ours.config.layers == CFG_DENSE.layers
    values = random_values(CFG_DENSE, 0)
    name = "backbone.layers.2.mixer.k_proj.weight"
    row = next(row for row in refengine.spec.tensors.table(CFG_DENSE) if row.name == name)
    np.testing.assert_allclose(ours.read(name), values(row), rtol=2**-8)
    with (
        refengine.load(tmp_path / "x.gguf", backend="numpy") as engine,
        pytest.raises(InputError, match="token ids"),
    ):
        engine.complete("text")


def test_a_tokenizer_with_other_cuts_is_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+|\s+"
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="GGUF has no name for"):
        convert(tmp_path / "model", tmp_path / "x.gguf")

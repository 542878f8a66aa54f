"""A model in several GGUF files is opened by its first file, in the time that its headers take."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.gguf.write import keys_of, pieces
from refengine.spec.config import Config
from refengine.spec.tensors import table
from tests.support.checkpoints import refusal
from tests.support.gguf import NUMBER, Entry, gguf_bytes, parts
from tools.releases import ULTRA

GOOD = Path(__file__).parent / "gguf" / "experts-q8_0.gguf"


def split(folder: Path, count: int = 3, path: Path = GOOD) -> Path:
    """Write a file as several; return the path of the first."""
    metadata, entries, data = parts(path)
    names = [f"m-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        mine = entries[i * len(entries) // count : (i + 1) * len(entries) // count]
        begin = min(at.offset for at in mine)
        end = min((at.offset for at in entries if at.offset > max(m.offset for m in mine)), default=len(data))
        keys = {"split.no": i, "split.count": count, "split.tensors.count": len(entries)}
        moved = [at._replace(offset=at.offset - begin) for at in mine]
        raw = gguf_bytes((metadata if i == 0 else {}) | keys, moved, data[begin:end])
        (folder / name).write_bytes(raw)
    return folder / names[0]


def test_parts_hold_what_the_whole_holds(tmp_path):
    whole, several = Checkpoint.open(GOOD), Checkpoint.open(split(tmp_path))
    assert len(several.files) == 3 and several.config == whole.config
    for name in whole.stored:
        assert several.stored[name].raw == whole.stored[name].raw
    assert several.digest() != whole.digest()
    assert Checkpoint.open(tmp_path).directory.name == "m-00001-of-00003.gguf"


def test_a_missing_part_is_named(tmp_path):
    first = split(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    assert "needs m-00002-of-00003.gguf beside it" in refusal(first)


def test_a_later_part_names_the_first(tmp_path):
    split(tmp_path)
    assert "part 2 of 3 of a model: give the first, m-00001-of-00003.gguf" in refusal(
        tmp_path / "m-00002-of-00003.gguf"
    )


def test_a_part_under_another_name_is_refused(tmp_path):
    split(tmp_path).rename(tmp_path / "model.gguf")
    assert "has to be called so: NAME-00001-of-00003.gguf" in refusal(tmp_path / "model.gguf")


def test_parts_of_two_models_are_refused(tmp_path):
    first = split(tmp_path)
    os.replace(tmp_path / "m-00003-of-00003.gguf", tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").write_bytes((tmp_path / "m-00002-of-00003.gguf").read_bytes())
    assert "which m-00002-of-00003.gguf has too" in refusal(first)


def sparse(folder: Path, cfg: Config, kind: str, count: int) -> Path:
    """Write the headers of a model in several files with holes for the data; return the path of the first."""
    rows = [(piece.name, piece.shape[::-1], NUMBER[piece.type.name], piece.nbytes) for piece in
            pieces(cfg, lambda name: np.zeros(0), kind)]  # fmt: skip
    tokens = [f"t{i}" for i in range(cfg.vocab_size)]
    texts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "tekken", "tokenizer.ggml.tokens": tokens}
    texts |= {"tokenizer.ggml.token_type": [1] * len(tokens)}
    texts |= {"tokenizer.ggml.merges": [f"t{i} t{i + 1}" for i in range(len(tokens))]}
    metadata = {"general.architecture": "nemotron_h_moe"} | keys_of(cfg, kind) | texts
    for i in range(count):
        entries, offset = [], 0
        for name, dims, number, nbytes in rows[i * len(rows) // count : (i + 1) * len(rows) // count]:
            entries.append(Entry(name, dims, number, offset))
            offset += nbytes + -nbytes % 32
        keys = {"split.no": i, "split.count": count, "split.tensors.count": len(rows)}
        raw = gguf_bytes((metadata if i == 0 else {}) | keys, entries)
        path = folder / f"big-{i + 1:05}-of-{count:05}.gguf"
        path.write_bytes(raw)
        os.truncate(path, len(raw) + offset)
    return folder / f"big-00001-of-{count:05}.gguf"


@pytest.mark.slow
def test_a_file_of_hundreds_of_gigabytes_opens_at_once(tmp_path):
    """Ultra in NVFP4, in five parts of holes: more than 300 GB, and headers with a vocabulary of 131,072."""
    cfg = Config.from_hf(ULTRA)
    first = sparse(tmp_path, cfg, "nvfp4", 5)
    began = time.process_time()
    checkpoint = Checkpoint.open(first)
    seconds = time.process_time() - began
    assert sum(file.size for file in checkpoint.files) > 300e9
    assert len(checkpoint.stored) == len(table(cfg)) and checkpoint.config.layers == cfg.layers
    weight = checkpoint.read("backbone.layers.1.mixer.experts.511.down_proj.weight")
    assert weight.kind == "nvfp4" and weight.shape == (2048, 5120)
    assert not weight[:2].dequantize().any()
    assert seconds < 4  # of a processor, on any machine; 1.0 when it was measured

"""GGUF files of llama.cpp have each tensor, the configuration and the texts of the original model.

tools/write/gguf_files.py recorded the files in `gguf/`; their models are made again here from a seed.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.generation_config import generation_config
from refengine.checkpoint.gguf.stored import LIBRARY, format_of
from refengine.spec.arrays import Array
from refengine.spec.blocks import Blocks
from refengine.spec.layout import plan
from refengine.spec.shard import Shard, cut, held_tensors
from refengine.spec.tensors import table
from refengine.text.chat_template import ChatTemplate
from refengine.text.tokenizer import Tokenizer
from tests.support.gguf import rewrite
from tools.write.gguf_files import FILES, original

HERE = Path(__file__).parent / "gguf"
ERRORS = {  # the largest relative rms error of a matrix in blocks of a type, with random weights
    "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.05, "Q5_1": 0.06, "Q5_0": 0.06, "Q4_K": 0.1, "Q4_1": 0.1,
    "IQ4_NL": 0.1, "IQ4_XS": 0.1, "Q4_0": 0.12, "NVFP4": 0.13, "MXFP4": 0.2, "Q3_K": 0.2, "Q2_K": 0.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """Return the directories of the two models."""
    folder = tmp_path_factory.mktemp("originals")
    return {name: original(folder / name, name) for name in ("experts", "dense")}


def wide(weight) -> Array:
    return weight.dequantize() if isinstance(weight, Blocks) else weight.astype(np.float32)


@pytest.mark.parametrize("name", FILES)
def test_each_tensor_of_a_recorded_file_is_that_of_the_original(name, originals):
    """Exactly if it is not packed, otherwise within the error of its type."""
    ours, theirs = Checkpoint.open(HERE / f"{name}.gguf"), Checkpoint.open(originals[FILES[name][0]])
    for row in table(ours.config):
        at, exact = ours.stored[row.name], wide(theirs.read(row.name))
        if at.dtype in ERRORS:
            error = np.sqrt(np.square(wide(at.array()) - exact).mean() / np.square(exact).mean())
            assert error < ERRORS[at.dtype], (row.name, at.dtype)
        else:
            np.testing.assert_array_equal(wide(at.array()), exact, err_msg=row.name)
    used = {at.dtype for at in ours.stored.values()}
    _, kind, more = FILES[name]
    wanted = set(map(str.upper, more.values())) or {kind.upper().removesuffix("_M").removesuffix("_MOE")}
    assert wanted <= used


@pytest.mark.parametrize("name", FILES)
def test_blocks_of_a_recorded_file_mean_what_the_library_says(name):
    path = HERE / f"{name}.gguf"
    ours = Checkpoint.open(path)
    theirs = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in
              gguf.GGUFReader(path).tensors}  # fmt: skip
    for at in ours.stored.values():
        value, whole = at.array(), theirs[at.name]
        if isinstance(value, Blocks) and value.data.base is not None and whole.shape == value.shape:
            np.testing.assert_array_equal(value.dequantize(), whole, err_msg=at.name)


@pytest.mark.parametrize("name", ["experts-head-bf16", "dense-q4_k"])
def test_the_configuration_and_the_texts_are_those_of_the_original(name, originals):
    path, directory = HERE / f"{name}.gguf", originals[FILES[name][0]]
    ours, theirs = Checkpoint.open(path).config.to_hf(), Checkpoint.open(directory).config.to_hf()
    for key in ("max_position_embeddings", "chunk_size", "pad_token_id"):  # llama.cpp writes others, or none
        del ours[key], theirs[key]
    assert ours == theirs
    assert generation_config(path)[0] == {"eos_token_id": [2, 11], "temperature": 0.5, "top_p": 0.95}
    if "head" in name:  # the others were recorded without a template
        assert ChatTemplate.load(path).sources == ChatTemplate.load(directory).sources
    ours, theirs = Tokenizer.load(path), Tokenizer.load(directory)
    assert ours.stop_ids == theirs.stop_ids and ours.generation == theirs.generation
    for text in ("the cat sat", "<|im_start|>user\nhello, there.\n<|im_end|>", "a  b\n\n c"):
        assert ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == text


def renamed(metadata, entries, data):
    """Return a file as Ollama writes it, with other names for the latent projections."""
    names = {"ffn_latent_down": "ffn_latent_in", "ffn_latent_up": "ffn_latent_out"}
    for old, new in names.items():
        entries = [at._replace(name=at.name.replace(old, new)) for at in entries]
    return metadata, entries, data


def as_stripped(metadata, entries, data):
    """Return a file without its prediction head, though its metadata declares one."""
    return metadata, [at for at in entries if not at.name.startswith("blk.3.")], data


@pytest.mark.parametrize("name, change", [("experts-q8_0", renamed), ("experts-head-bf16", as_stripped)])
def test_other_files_of_the_same_model_have_the_same_weights(name, change, tmp_path):
    ours = Checkpoint.open(rewrite(HERE / f"{name}.gguf", tmp_path / "x.gguf", change))
    theirs = Checkpoint.open(HERE / f"{name}.gguf")
    for row in table(ours.config):
        assert ours.stored[row.name].raw == theirs.stored[row.name].raw
    assert [bool(ours.notes), "mtp" in str(ours.notes)] == [change is as_stripped] * 2


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 3)])
def test_ranks_hold_slices_of_the_matrices(layout):
    checkpoint = Checkpoint.open(HERE / "experts-q4_0.gguf")
    cfg = checkpoint.config
    for rank in range(plan(cfg, *layout).ranks):
        shard = Shard(plan(cfg, *layout), rank)
        for row in held_tensors(cfg, shard):
            weight = checkpoint.read(row.name)
            part, exact = cut(row, weight, cfg, shard), cut(row, wide(weight), cfg, shard)
            np.testing.assert_array_equal(wide(part), exact, err_msg=row.name)


def test_kinds_of_the_library_are_read_through_it(tmp_path):
    rng = np.random.default_rng(0)
    for kind in LIBRARY.values():
        form = format_of(kind.name)
        raw = rng.integers(0, 256, (3, 2 * form.nbytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            exact = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name])
            np.testing.assert_array_equal(Blocks(form, raw).dequantize(), exact)
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.columns, kind.nbytes)

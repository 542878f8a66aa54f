"""Packed checkpoints of any mix of kinds are read without unpacking, and run."""

import json
import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import refengine
from refengine.checkpoint import Checkpoint
from refengine.conformance.cases import agree
from refengine.spec.layout import Layout
from refengine.spec.model import Model
from refengine.spec.ops import DEFINITION, REFERENCE, linear, linear_in_strips, mlp_in_strips, numpy_backend
from refengine.spec.quant import Packed
from refengine.spec.shard import Shard, cut, held, held_tensors
from refengine.spec.tensors import table
from tests.support.checkpoints import add, alter_json
from tests.support.packed import CFG, FORMATS, all_in, mixed, packed_checkpoint, weights

IDS = [3, 99, 41, 7, 100, 12, 64, 5, 3]
CHOICES = {"mixed": mixed} | {name: all_in(name) for name in ("NVFP4", "W4A8", "FP8", "MXFP8")}
each_choice = pytest.mark.parametrize("choice", CHOICES)


def dequantized(made):
    return {name: w.dequantize() if isinstance(w, Packed) else w for name, w in made.items()}


@each_choice
def test_a_packed_checkpoint_is_read_as_it_is(choice, tmp_path):
    checkpoint = Checkpoint.open(packed_checkpoint(tmp_path, CHOICES[choice]))
    made = weights(CFG, CHOICES[choice])
    assert checkpoint.config == CFG and not checkpoint.notes
    for row in table(CFG):
        wanted, found = made[row.name], checkpoint.read(row.name)
        assert type(found) is type(wanted) and found.shape == row.shape, row.name
        if isinstance(wanted, Packed):
            assert found.kind == wanted.kind == checkpoint.stored[row.name].dtype
            wanted, found = wanted.dequantize(), found.dequantize()
        assert np.array_equal(wanted, found), row.name
        assert checkpoint.bytes_of(row) == made[row.name].nbytes


@each_choice
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packed_weights_compute_what_their_matrices_compute(choice, dtype, tmp_path):
    checkpoint = Checkpoint.open(packed_checkpoint(tmp_path, CHOICES[choice]))
    plain = dequantized(weights(CFG, CHOICES[choice]))
    found, wanted = (
        logits(Model.build(CFG, read, numpy_backend(dtype, resident)))
        for read, resident in ((checkpoint.read, True), (plain.__getitem__, False))
    )
    agree(found, wanted, dtype, terms=CFG.hidden_size)


def logits(model):
    ids = np.array([IDS])
    h, _ = model.blocks(model.embed(ids), model.new_states(1))
    return model.head(h)


def test_packed_weights_stay_packed_when_they_are_placed(tmp_path):
    """A placed weight takes the memory of the file, whatever `resident` is."""
    checkpoint = Checkpoint.open(packed_checkpoint(tmp_path))
    model = Model.build(CFG, checkpoint.read, numpy_backend(np.float32, resident=True))
    up, down = model.weights["layers.2"]["mixer"]["experts"][0]
    for weight in (up, down, model.weights["layers.0"]["mixer"]["in_proj.weight"]):
        assert isinstance(weight, Packed) and not weight.codes.flags.owndata


def in_form(form, w):
    """Return a matrix in a form that must be widened: bfloat16, or packed."""
    w = w.astype(ml_dtypes.bfloat16)
    return FORMATS[form](w) if form in FORMATS else w


@pytest.mark.parametrize("form", ["BF16", *(form for form in FORMATS if form != "W4A8")])
@pytest.mark.parametrize("strip", [1, 200, 64 * 40, 10**6])
def test_strips_of_a_matrix_make_the_same_product(form, strip):
    """Exactly, because all numbers are small integers and the order of additions does not matter."""
    rng = np.random.default_rng(strip)
    w = 6 * rng.integers(-1, 2, (40, 64))  # exact in every form: each block has a 6 but for zeros
    w[:, ::16] = 6
    x, weight = rng.integers(-8, 9, (3, 2, 64)).astype(np.float32), in_form(form, w)
    y = linear(x, weight)
    assert np.array_equal(linear_in_strips(x, weight, strip), y) and np.array_equal(y, x @ w.T)
    pair = linear_in_strips(x, (weight, weight), strip)
    assert np.array_equal(pair, linear(x, (weight, weight))) and pair.dtype == x.dtype
    assert linear_in_strips(x[:0], weight, strip).shape == (0, 2, 40)


@pytest.mark.parametrize("form", ["BF16", *FORMATS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_numpy_backend_computes_in_strips_what_the_definition_computes(form, dtype, monkeypatch):
    monkeypatch.setattr(linear_in_strips, "__defaults__", (500,))
    rng = np.random.default_rng(0)
    up, down, pair = (in_form(form, rng.normal(size=shape)) for shape in ((96, 64), (64, 96), (32, 128)))
    x, y = rng.normal(size=(2, 2, 3, 64)).astype(dtype)
    for name, terms, args in (
        ("linear", 64, (x, up)), ("mlp", 160, (x, up, down)), ("logits", 64, (x, up)),
        ("linear_pair", 128, (x, y, pair)),
    ):  # fmt: skip
        found, wanted = (getattr(ops, name)(*args) for ops in (REFERENCE, DEFINITION))
        assert found.dtype == wanted.dtype
        agree(found, wanted, dtype, terms=terms)
    assert REFERENCE.mlp is mlp_in_strips


@pytest.mark.parametrize("form", ["BF16", "NVFP4", "FP8", "MXFP8"])
def test_a_large_matrix_is_never_widened_whole(form):
    weight = in_form(form, np.ones((2**14, 64)))
    x, strip = np.ones((1, 1, 64), np.float32), 2**14
    tracemalloc.start()
    linear_in_strips(x, weight, strip)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * strip + 4 * 2**14 + 2**15, "a strip, its indices, the product; widened it takes 4 MB"


def test_beside_packed_weights_plain_ones_stay_in_the_file_too(tmp_path):
    """So a model takes the memory of its files, however much memory is free."""
    model = refengine.load(packed_checkpoint(tmp_path)).model
    assert all(part.dtype == ml_dtypes.bfloat16 for part in model.weights["layers.1"]["mixer"]["qkv_proj"])


def test_a_backend_that_does_not_know_packed_weights_gets_matrices_in_bfloat16(tmp_path):
    path = packed_checkpoint(tmp_path)
    mine = replace(numpy_backend(np.float32), name="mine", packed=False)
    engine = refengine.load(path, backend=mine)
    (note,) = engine.checkpoint.notes
    assert note == "the mine backend keeps packed weights as matrices in bfloat16, which are larger"
    exact = refengine.load(path).logits(IDS)
    agree(engine.logits(IDS), exact, ml_dtypes.bfloat16, terms=1)


@pytest.mark.parametrize("layout", [Layout(2), Layout(3), Layout(1, 2), Layout(2, 2, 2)], ids=str)
def test_ranks_hold_slices_of_packed_weights(layout, tmp_path):
    checkpoint = Checkpoint.open(packed_checkpoint(tmp_path))
    for rank in range(layout.ranks):
        shard = Shard(layout, rank)
        for row in held_tensors(CFG, shard):
            whole = checkpoint.read(row.name)
            part = cut(row, whole, CFG, shard)
            assert isinstance(part, Packed) == isinstance(whole, Packed)
            if isinstance(whole, Packed):
                axis, ranges = held(row, CFG, shard)
                columns = np.concatenate([np.arange(r.start, r.stop) for r in ranges])
                assert np.array_equal(part.dequantize(), whole.dequantize().take(columns, axis))
                assert part.nbytes <= whole.nbytes


def quantization(path, **said):
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": said}))
    return Checkpoint.open(path).notes


def test_metadata_that_agrees_leaves_no_note(tmp_path):
    path = packed_checkpoint(tmp_path)
    kinds = {name: at.dtype for name, at in Checkpoint.open(path).stored.items()}
    layers = {
        name.removesuffix(".weight"): {"quant_algo": kind}
        for name, kind in kinds.items()
        if kind in ("NVFP4", "FP8", "MXFP8")
    }
    assert not quantization(path, quant_algo="MIXED_PRECISION", quantized_layers=layers)


def test_what_modelopt_writes_besides_does_no_harm(tmp_path):
    """Unknown names, one entry for the experts of a layer, and patterns that match other layers too."""
    path = packed_checkpoint(tmp_path)
    layers = {
        "\0backbone.pt_name_sentinel": {"quant_algo": "FP8"},
        "backbone.layers.2.mixer.experts": {"quant_algo": "NVFP4"},
        "mtp*": {"quant_algo": "NVFP4"},
    }
    excluded = ["backbone.layers.1*", "lm_head*", "\0backbone.pt_name_sentinel", 5, None]
    assert not quantization(path, quantized_layers=layers, exclude_modules=excluded)
    for said in ({"quantized_layers": 5}, {"quant_algo": ["FP8"]}, {"exclude_modules": "x"}):
        assert not quantization(path, **said)


def test_metadata_that_contradicts_the_files_is_named_and_not_believed(tmp_path):
    path = packed_checkpoint(tmp_path)
    (note,) = quantization(
        path, quantized_layers={"backbone.layers.0.mixer.in_proj": {"quant_algo": "NVFP4"}}
    )
    assert "calls 'backbone.layers.0.mixer.in_proj' NVFP4, the files hold it as FP8: the files count" in note
    (note,) = quantization(path, quantized_layers={"mtp.layers.0.eh_proj": {"quant_algo": "FP8"}})
    assert "calls 'mtp.layers.0.eh_proj' FP8, the files hold it as BF16" in note
    (note,) = quantization(path, quant_algo="FP8", exclude_modules=["lm_head"])
    assert "more FP8, the files hold it as" in note
    (note,) = quantization(path, exclude_modules=["lm_head"])
    assert "calls 'lm_head' not packed, the files hold it as NVFP4" in note


def test_scales_of_a_packed_cache_change_nothing(tmp_path):
    path = packed_checkpoint(tmp_path)
    for key in ("k_proj.k_scale", "v_proj.v_scale"):
        add(path / "model.safetensors", f"backbone.layers.1.mixer.{key}", np.ones((), np.float32), "F32")
    (note,) = Checkpoint.open(path).notes
    assert "k_scale' and 1 more would change nothing" in note


def test_other_spellings_of_names_are_known_with_scales(tmp_path):
    from tests.support.checkpoints import rename

    path = packed_checkpoint(tmp_path, all_in("NVFP4"))
    rename(
        path / "model.safetensors",
        lambda name: name.replace("backbone.", "model.").replace("embeddings.", "embed_tokens."),
    )
    assert Checkpoint.open(path).stored["backbone.embeddings.weight"].dtype == "NVFP4"


def test_auto_is_bfloat16_for_packed_weights(tmp_path):
    checkpoint = Checkpoint.open(packed_checkpoint(tmp_path, all_in("NVFP4")))
    assert (checkpoint.auto_dtype("torch"), checkpoint.auto_dtype("numpy")) == ("bfloat16", "float32")


def test_a_half_written_key_is_no_traceback(tmp_path):
    path = packed_checkpoint(tmp_path)
    alter_json(path / "config.json", quantization_config={"quantized_layers": {"lm_head": None}})
    assert not Checkpoint.open(path).notes

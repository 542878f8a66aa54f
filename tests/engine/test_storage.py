"""Dtypes of stored states have the right defaults, refusals and texts, on the command line and in Python."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import refengine
from refengine.backends.cpu import native
from refengine.checkpoint import Checkpoint
from refengine.cli.generate import generate
from refengine.cli.inspect import inspect
from refengine.loop import Loop
from refengine.runner import LocalRunner
from refengine.spec import mtp
from refengine.spec.config import InputError
from refengine.storage import Sizes, bytes_on, sizes, storage
from tests.support.checkpoints import CONFIGS, add, alter_json, random_checkpoint

pytestmark = pytest.mark.slow

compiled = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
DECLARED = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}
GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


def with_scales(path, k=0.25, v=None):
    cfg = CONFIGS["attention"]
    random_checkpoint(path, cfg)
    layer = cfg.layers.index("*")
    for key, value in (("k_proj.k_scale", k), ("v_proj.v_scale", v)):
        if value is not None:
            name = f"backbone.layers.{layer}.mixer.{key}"
            add(path / "model.safetensors", name, np.array(value, np.float32), "F32")
    return f"layers.{layer}"


def test_the_declaration_of_a_checkpoint_is_the_default(tmp_path):
    block = with_scales(tmp_path)
    assert storage(Checkpoint.open(tmp_path), None, None).kv is None
    alter_json(tmp_path / "config.json", quantization_config=DECLARED)
    found = storage(Checkpoint.open(tmp_path), None, None)
    assert (found.kv, found.scales) == ("fp8", {block: (0.25, 1.0)}), "a scale that is missing is 1"
    assert storage(Checkpoint.open(tmp_path), "float32", None).kv == "float32"
    engine = refengine.load(tmp_path)
    cache = engine.runner.new_states(1)[int(block.partition(".")[2])]
    assert cache.stored.k_scale == 0.25 and cache.k.dtype.itemsize == 1


def test_the_cache_of_the_prediction_head_has_its_own_scales(tmp_path):
    random_checkpoint(tmp_path, CONFIGS["head"])
    key = "mtp.layers.0.mixer.v_proj.v_scale"
    add(tmp_path / "model.safetensors", key, np.array(0.5, np.float32), "F32")
    engine = refengine.load(tmp_path, kv_dtype="fp8")
    cache = mtp.new_states(engine.model, 1)[0]
    assert (cache.stored.k_scale, cache.stored.v_scale) == (1.0, 0.5)


@pytest.mark.parametrize(
    "scheme", [{"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}, "FP8", 3, None]
)
def test_other_declarations(scheme, tmp_path):
    with_scales(tmp_path)
    alter_json(tmp_path / "config.json", quantization_config={"kv_cache_scheme": scheme, "quant_method": "x"})
    eight = isinstance(scheme, dict) and scheme["type"] == "float"
    assert (storage(Checkpoint.open(tmp_path), None, None).kv == "fp8") == eight


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, [1.0, 2.0]])
def test_a_scale_that_is_no_scale_is_refused(scale, tmp_path):
    with_scales(tmp_path, scale)
    with pytest.raises(InputError, match=r"k_scale.* is not one positive number"):
        storage(Checkpoint.open(tmp_path), "fp8", None)


@pytest.mark.parametrize("dtype, bits", [("I64", 64), ("I32", 32), ("F8_E4M3", 8), ("BOOL", 8)])
def test_a_scale_in_a_dtype_that_is_not_read_is_refused(dtype, bits, tmp_path):
    with_scales(tmp_path, None)
    name = f"backbone.layers.{CONFIGS['attention'].layers.index('*')}.mixer.k_proj.k_scale"
    add(tmp_path / "model.safetensors", name, np.array(1, f"u{bits // 8}"), dtype)
    with pytest.raises(InputError, match=rf"k_scale' in .* has the dtype {dtype}, which is none of BF16"):
        storage(Checkpoint.open(tmp_path), "fp8", None)


@pytest.mark.parametrize("choice", [{"kv_dtype": "int8"}, {"ssm_dtype": "bfloat16"}, {"kv_dtype": 8}])
def test_dtypes_that_there_are_not_are_refused(choice):
    with pytest.raises(InputError, match="is not one of float32"):
        refengine.load("tiny", **choice)
    ((name, value),) = choice.items()
    said = CliRunner().invoke(generate, ["x", f"--{name.replace('_', '-')}", str(value)])
    assert said.exit_code == 2 and "Invalid value" in said.output


@pytest.mark.parametrize("name", ["numpy", pytest.param("cpu", marks=compiled)])
def test_text_in_few_bits_is_the_same_again_and_in_company(name):
    """Random rounding depends on the seed of a sequence, not on earlier or concurrent sequences."""
    invariant = {"batch_invariant": True} if name == "cpu" else {}
    engine = refengine.load("tiny", name, kv_dtype="fp8", ssm_dtype="float16", **invariant)
    prompts, how = ["Once upon a time", "One day", "The cat"], {"seed": 5, "max_tokens": 12}
    texts: list[str] = [""] * 3
    for i, event in engine.generate_batch(prompts, **how):
        texts[i] += event.text
    for i, prompt in enumerate(prompts):
        assert engine.complete(prompt, seed=5 + i, max_tokens=12) == texts[i]


@compiled
def test_the_cpu_backend_stores_what_inspect_tells(tmp_path):
    checkpoint = Checkpoint.open("tiny")
    for kept in ({}, {"kv": "fp8", "ssm": "float16"}, {"kv": "float32"}):
        names = {f"{key}_dtype": value for key, value in kept.items()}
        engine = refengine.load("tiny", "cpu", "auto", **names)
        said = bytes_on("cpu", checkpoint.config, "bfloat16", **kept)
        found = sizes(engine.runner.new_states(1), engine.config)
        fixed = said["ssm_bytes"] + said["conv_bytes"]
        assert found == Sizes(fixed, said["kv_bytes_per_token"], said["kv_dtype"])
        args = [f"--{name.replace('_', '-')}={value}" for name, value in names.items()]
        told = json.loads(CliRunner().invoke(inspect, ["tiny", "--backend", "cpu", "--json", *args]).output)
        assert told["state"]["context_bytes"] == found.of(told["state"]["context"])


def held(cache) -> int:
    """Return the bytes of memory that a cache has."""
    if hasattr(cache, "pages"):
        return sum(page.data.nbytes for pages in cache.pages for page in pages)
    return cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize(
    "name, kv",
    [
        ("numpy", "fp8"),
        ("torch", "fp8"),
        pytest.param("cpu", "bfloat16", marks=compiled),
        pytest.param("numpy", "float32", marks=pytest.mark.thorough),
        pytest.param("torch", "bfloat16", marks=pytest.mark.thorough),
        pytest.param("cpu", "fp8", marks=[compiled, pytest.mark.thorough]),
    ],
)
def test_a_long_context_takes_what_inspect_says(name, kv):
    """Caches are filled without reading, up to 65,536, 262,144 and 1,048,576 positions."""
    if name == "torch":
        pytest.importorskip("torch")
    engine = refengine.load("tiny", name, dtype="float32", kv_dtype=kv)
    cfg, here = engine.config, engine.model.backend
    said = bytes_on(name, cfg, "float32", kv)["kv_bytes_per_token"] / cfg.layers.count("*")
    cache = next(state for state in engine.runner.new_states(1) if hasattr(state, "k"))
    noise = here.array(np.ones((1, 1 << 14, cfg.num_key_value_heads, cfg.head_dim), np.float32))
    for context in (1 << 16, 1 << 18, 1 << 20):
        while (known := int(cache.length[0])) < context:
            cache = cache.append(noise, noise)
        assert 1 <= held(cache) / (said * known) < 1.1


def test_a_context_that_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    engine = refengine.load("tiny")
    monkeypatch.setattr("refengine.runner.available_memory", lambda: 10**6)
    calls: list = []
    monkeypatch.setattr(LocalRunner, "read", lambda *a: calls.append(a))
    with pytest.raises(
        InputError, match=r"a sequence of \d+ tokens needs .* MB beside the weights .*1 MB of memory"
    ):
        engine.complete("Once upon a time", max_tokens=10000)
    assert not calls
    monkeypatch.undo()
    assert engine.complete("Once upon a time", max_tokens=3, temperature=0), "the engine goes on"
    assert isinstance(engine.loop, Loop) and not engine.loop.active


def test_fewer_bits_change_little_on_the_embedded_model():
    """The figures are in docs/storage.md."""
    whole = refengine.load("tiny").logits(list(range(100, 140)))
    for kept in ({"kv_dtype": "bfloat16"}, {"kv_dtype": "fp8"}):
        near = refengine.load("tiny", **kept).logits(list(range(100, 140)))
        assert 0 < np.abs(near - whole).mean() < 0.5

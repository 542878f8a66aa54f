"""Scales of inputs and of an FP8 cache come from the activations of a model on a text."""

import json

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.safetensors_file import SafetensorsFile
from refengine.cli.quantize import quantize as command
from refengine.conformance.cases import Case
from refengine.quantize import quantize, recipe_of
from refengine.quantize import write as module
from refengine.quantize.calibrate import calibrate, recording
from refengine.quantize.recipes import Recipe
from refengine.spec.config import InputError
from refengine.spec.model import Model
from refengine.spec.moe import Routing
from refengine.spec.numerics import relu2
from refengine.spec.ops import DEFINITION, numpy_backend
from refengine.spec.tensors import table
from refengine.text.ids_only import tokenizer_of
from tests.support.checkpoints import random_checkpoint
from tests.support.packed import CFG

pytestmark = pytest.mark.slow

TEXTS = ["Once upon a time, there was a small fox.", "Mia had a kite."]


@pytest.fixture(scope="module")
def tiny():
    return Checkpoint.open("tiny")


@pytest.fixture(scope="module")
def largest(tiny):
    return calibrate(tiny, TEXTS)


def literally(source, texts):
    """Return the same by the definition in float64, token by token; weights are identified by their bytes."""
    found: dict[str, float] = {}
    names = {source.read(row.name).tobytes(): row.name for row in table(source.config)}
    attentions = [i for i, kind in enumerate(source.config.layers) if kind == "*"]
    calls = []

    def see(name, x):
        found[name] = max(found.get(name, 0.0), *(abs(float(each)) for each in x.reshape(-1)))

    def linear(x, weight):
        for part in weight if isinstance(weight, tuple) else (weight,):
            see(names[part.tobytes()], x)
        return DEFINITION.linear(x, weight)

    def route(h, gate, bias, cfg):
        see(names[gate.astype(ml_dtypes.bfloat16).tobytes()], h)  # it was widened when it was placed
        return DEFINITION.route(h, gate, bias, cfg)

    def mlp(h, up, down):
        return linear(relu2(linear(h, up)), down)

    def attention(q, k, v, cache, lengths):
        base = f"backbone.layers.{attentions[len(calls) % len(attentions)]}.mixer."
        calls.append(base)
        see(f"{base}k_proj.k_scale", k)
        see(f"{base}v_proj.v_scale", v)
        return DEFINITION.attention(q, k, v, cache, lengths)

    def experts(u, matrices, routing):
        y = np.zeros_like(u)
        for at in np.ndindex(routing.expert.shape):
            y[at[:-1]] += routing.weight[at] * mlp(u[at[:-1]], *matrices[int(routing.expert[at])])
        return y

    def logits(hidden, lm_head):
        return linear(hidden, lm_head)

    verbs = {
        "linear": linear,
        "route": route,
        "mlp": mlp,
        "attention": attention,
        "experts": experts,
        "logits": logits,
    }
    ops = type(DEFINITION)(**dict(DEFINITION) | verbs)
    model = Model.build(source.config, source.read, numpy_backend(np.float64, False, ops))
    for text in texts:
        states = model.new_states(1)
        for token in tokenizer_of(source.directory, source.config).encode(text):
            h, states = model.blocks(model.embed(np.array([[token]])), states)
            model.head(h)
    layers: dict[str, float] = {}  # of the experts of a layer, up or down
    for name, value in found.items():
        if ".experts." in name:
            key = name.split(".experts.")[0] + name.rsplit(".", 2)[1]
            layers[key] = max(layers.get(key, 0.0), value)
    for row in table(source.config):
        if row.role == "routed_expert" and not row.block.startswith("mtp."):
            found[row.name] = layers[row.name.split(".experts.")[0] + row.name.rsplit(".", 2)[1]]
    return found


def test_the_largest_magnitudes_are_those_of_a_literal_computation(tiny, largest):
    wanted = literally(tiny, TEXTS)
    experts = 2 * tiny.config.n_routed_experts * tiny.config.layers.count("E")
    assert largest.keys() == wanted.keys() and len(wanted) > experts > 100
    for name, value in wanted.items():
        assert largest[name] == pytest.approx(value, rel=1e-3), name


def test_every_matrix_of_the_trunk_has_one(tiny, largest):
    rows = [row for row in table(tiny.config) if row.precision == "matrix" or row.key.endswith("gate.weight")]
    names = {row.name for row in rows if not row.block.startswith("mtp.")} | {"lm_head.weight"}
    assert names == {name for name in largest if not name.endswith("_scale")}


def scales(path):
    """Return the single scales that calibration adds, as stored in the file."""
    ends = (".input_scale", ".k_scale", ".v_scale")
    (path,) = path.glob("*.safetensors")
    tensors = SafetensorsFile(path).tensors
    assert all(at.dtype == "F32" and at.shape == () for name, at in tensors.items() if name.endswith(ends))
    return {name: float(at.array()) for name, at in tensors.items() if name.endswith(ends)}


@pytest.mark.parametrize(
    ("recipe", "inputs", "cache"),
    [("nvfp4", {"NVFP4": 6 * 448}, False), ("w4a8", {"NVFP4": 448}, False), ("fp8", {"FP8": 448}, False),
     ("ultra", {"NVFP4": 6 * 448, "FP8": 448}, True), ("lightning", {"FP8": 448}, True)],
)  # fmt: skip
def test_scales_are_written_as_modelopt_means_them(
    recipe, inputs, cache, tiny, largest, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "calibrate", lambda source, texts: largest)
    quantize("tiny", tmp_path / "out", recipe_of(recipe), texts=TEXTS)
    quantize("tiny", tmp_path / "plain", recipe_of(recipe))
    found, new = scales(tmp_path / "out"), Checkpoint.open(tmp_path / "out")
    old = Checkpoint.open(tmp_path / "plain")
    wanted = {}
    for row in table(tiny.config):
        kind, base = new.stored[row.name].dtype, row.name.removesuffix("weight")
        if kind in inputs:
            wanted[f"{base}input_scale"] = float(np.float32(largest[row.name] / inputs[kind]))
            assert new.read(row.name).input_scale == np.float32(wanted[f"{base}input_scale"])
        if hasattr(new.read(row.name), "codes"):
            a, b = new.read(row.name), old.read(row.name)
            assert np.array_equal(a.codes, b.codes) and np.array_equal(a.scale, b.scale), row.name
    if cache:
        names = [name for name in largest if name.endswith("_scale")]
        assert len(names) == 2 * tiny.config.layers.count("*")
        wanted |= {name: float(np.float32(largest[name] / 448)) for name in names}
    assert found == wanted and all(found.values())


def test_metadata_names_what_the_files_hold(largest, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "calibrate", lambda source, texts: largest)
    for recipe in ("nvfp4", "lightning"):
        quantize("tiny", tmp_path / recipe, recipe_of(recipe), texts=TEXTS)
    said = json.loads((tmp_path / "nvfp4/hf_quant_config.json").read_text())["quantization"]
    assert (said["quant_algo"], said["group_size"], said["kv_cache_quant_algo"]) == ("NVFP4", 16, None)
    said = json.loads((tmp_path / "lightning/hf_quant_config.json").read_text())["quantization"]
    kinds = {each["quant_algo"] for each in said["quantized_layers"].values()}
    assert kinds == {"FP8", "W4A16_NVFP4"} and said["kv_cache_quant_algo"] == "FP8"
    config = json.loads((tmp_path / "lightning/config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert all("call" not in note for note in Checkpoint.open(tmp_path / "lightning").notes)


def test_it_goes_on_after_a_stop_with_the_same_scales(largest, tmp_path, monkeypatch):
    calls = []

    def counted(source, texts):
        calls.append(texts)
        return largest

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "calibrate", counted)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_put", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize("tiny", tmp_path / "out", recipe_of("super"), texts=TEXTS)
    for texts in (None, TEXTS[:1]):
        with pytest.raises(InputError, match="a part of another model or recipe"):
            quantize("tiny", tmp_path / "out", recipe_of("super"), texts=texts)
    quantize("tiny", tmp_path / "out", recipe_of("super"), texts=TEXTS)
    quantize("tiny", tmp_path / "whole", recipe_of("super"), texts=TEXTS)
    assert len(calls) == 2, "once for each directory"
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("recipe", ["w4a16", "mxfp8"])
def test_a_recipe_without_scales_of_inputs_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match=f"recipe {recipe} has no scales of inputs or of the cache"):
        quantize("tiny", tmp_path / "out", recipe_of(recipe), texts=TEXTS)
    assert not (tmp_path / "out").exists()


def test_the_prediction_head_is_not_calibrated(tmp_path):
    recipe = Recipe("mine", {}, {"mtp.*eh_proj*": "fp8"})
    with pytest.raises(InputError, match=r"packs mtp.*eh_proj.weight, whose inputs are not calibrated"):
        quantize("tiny", tmp_path / "out", recipe, texts=TEXTS)


def test_an_empty_text_and_a_model_without_a_tokenizer_are_one_sentence(tiny, tmp_path):
    with pytest.raises(InputError, match="the text for calibration is empty"):
        calibrate(tiny, [""])
    model = random_checkpoint(tmp_path / "model", CFG)
    with pytest.raises(InputError):
        quantize(model, tmp_path / "out", recipe_of("nvfp4"), texts=TEXTS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(value):
    """A weight that stays plain may hold such a number."""
    case = Case(layers="-")
    backend, _ = recording(numpy_backend(np.float32))
    up, down = Model.build(case.cfg, case.read, backend).weights["layers.0"]["mixer"].values()
    u = np.full((1, 1, case.cfg.hidden_size), value, np.float32)
    with pytest.raises(InputError, match=r"calibration failed: backbone.*\.up_proj\.weight meets a number"):
        backend.ops.mlp(u, up, down)


def test_an_expert_is_measured_on_the_tokens_that_chose_it():
    """The smaller of two tokens chooses expert 0, and the other chooses expert 1."""
    case = Case(layers="E")
    backend, found = recording(numpy_backend(np.float32))
    experts = Model.build(case.cfg, case.read, backend).weights["layers.0"]["mixer"]["experts"]
    up = [case.exact(f"experts.{e}.up_proj.weight") for e in (0, 1)]
    u = np.stack([0.1 * up[0][0], up[0][1] - up[1][0]])[None].astype(np.float32)
    backend.ops.experts(u, experts, Routing(np.array([[[0], [1]]]), np.ones((1, 2, 1), np.float32)))
    inner = np.array([[relu2(token @ matrix.T).max() for matrix in up] for token in u[0]])
    reached = max(inner[0, 0], inner[1, 1])
    name = "backbone.layers.0.mixer.experts.5.down_proj.weight"
    assert found[name] == pytest.approx(reached, rel=1e-5) and reached < 0.9 * inner[1, 0]


def test_inputs_that_are_all_zero_have_the_scale_1(tiny):
    row = next(row for row in table(tiny.config) if row.role == "mamba")
    job = module.Job(row, module.FORMATS["fp8"], (row,))
    found = module.calibrated(job, recipe_of("fp8"), {row.name: 0.0})
    assert list(found.scales.values()) == [1.0]


def test_the_command_calibrates_on_a_file(largest, tmp_path):
    (tmp_path / "text").write_text(TEXTS[0])
    arguments = ["tiny", str(tmp_path / "out"), "--calibrate", "--texts", str(tmp_path / "text")]
    done = CliRunner().invoke(command, [*arguments, "--no-evaluate", "--json"])
    assert done.exit_code == 0 and "mamba" in json.loads(done.stdout)
    found = scales(tmp_path / "out")
    assert found and all(value <= largest[name.replace("input_scale", "weight")] / 2688 * 1.001
                         for name, value in found.items())  # fmt: skip

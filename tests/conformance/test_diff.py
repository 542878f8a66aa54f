"""`refengine diff` names the first wrong layer and its cause, for real programs, formulas and near ties."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest

import refengine.cli
from refengine.checkpoint import Checkpoint
from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import write
from refengine.conformance.cases import Case
from refengine.conformance.mistakes import named
from refengine.conformance.traces import load
from refengine.conformance.traces.diff import compare, diagnose, exercised
from refengine.conformance.traces.recompute import Recomputation
from refengine.spec.arrays import DTYPES
from refengine.spec.config import InputError
from refengine.spec.ops import numpy_backend
from tests.support.checkpoints import random_checkpoint
from tests.support.traces import clean, outside

pytestmark = pytest.mark.slow

CLAMP = "dt is held up at 0.001 in calls of several tokens"
CHUNKS = "a chunk's state is scaled and not carried on"
CLAMPED_CHUNKS = f"{CHUNKS}, and dt is held up at 0.001, as in transformers 5.14"
TRANSFORMERS = version("transformers") if find_spec("transformers") else ""
OLD = TRANSFORMERS.startswith("5.14.")  # carries states over chunks by a wrong sum, and has no dense layers
needs_transformers = pytest.mark.skipif(not TRANSFORMERS, reason="needs torch and transformers")
OLDER = os.environ.get("TRANSFORMERS", "")  # a folder that `pip install --target` filled with another version
IDS = " ".join(str(i) for i in range(3, 26))


@pytest.fixture
def cli(capsys):
    """Return (exit code, stdout, stderr) of a command that runs in this process."""

    def call(*args):
        code, _ = refengine.cli.run(lambda: refengine.cli.command([str(a) for a in args]), False)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a random model on disk with all kinds of layers and a head; some of its dt are below 0.001."""
    where = tmp_path_factory.mktemp("model")
    cfg = Case(layers="M*EM" if OLD else "M*EM-", mtp_layers="*E").cfg

    def values(row):
        value = random_values(cfg, seed=2)(row)
        return np.linspace(-9, 0, len(value)) if row.name.endswith("dt_bias") else value

    write(where, cfg, values)
    return where


def wrong(trace, case) -> list:
    return [f for f in diagnose(trace, case.cfg, case.read) if f.wrong]


@pytest.mark.slow
@needs_transformers
def test_transformers_as_shipped_is_diagnosed_by_its_clamp(cli, model, tmp_path):
    """Run with 5.14.0, 5.23.0 and 5.24.0."""
    cause = CLAMPED_CHUNKS if OLD else CLAMP
    common = ["trace", model, "--ids", IDS, "--cut", 9, "--steps", 2, "-o", tmp_path / "t"]
    assert cli(*common, "--from", "transformers")[0] == 0
    code, out, _ = cli("diff", tmp_path / "t", "--against", model, "--json")
    found = json.loads(out)
    assert code == 1 and found["first_wrong"] == "layers.0" and not found["agrees"]
    departs = {layer["name"]: layer for layer in found["layers"] if layer["departs"]}
    assert set(departs) == {"layers.0", "layers.3"}  # the Mamba layers, and nothing else
    assert all(layer["causes"] == [{"name": cause, "trap": 1}] for layer in departs.values())
    code, out, _ = cli("diff", tmp_path / "t", "--against", model)
    assert code == 1 and "reproduces 2 layers, all that depart" in out
    assert f"cause         {cause} (trap 1)\n" in out and "layers.0.scan is off by" in out


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_without_its_clamp_agrees(cli, model, tmp_path, dtype):
    common = ["trace", model, "--ids", IDS, "--cut", 9, "--steps", 2, "-o", tmp_path / "t", "--dtype", dtype]
    assert cli(*common, "--from", "transformers-unclamped")[0] == 0
    code, out, _ = cli("diff", tmp_path / "t", "--against", model)
    if OLD and dtype == "float32":  # its other fault is named alone; bfloat16 hides it
        assert code == 1 and f"cause         {CHUNKS}\n" in out
        return
    assert code == 0, out
    assert "agrees        every layer is within 8 roundings" in out and dtype in out


@pytest.mark.thorough
@needs_transformers
@pytest.mark.skipif(not OLDER, reason="needs TRANSFORMERS=FOLDER with another version of transformers")
def test_an_older_version_is_diagnosed_too():
    """The tests above pass with the package in the folder, which is 5.14.0 or another."""
    env = os.environ | {"PYTHONPATH": OLDER, "TRANSFORMERS": ""}
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    names = [
        test_transformers_as_shipped_is_diagnosed_by_its_clamp,
        test_transformers_without_its_clamp_agrees,
    ]
    chosen = ["-k", " or ".join(test.__name__ for test in names)]
    asked = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert found != TRANSFORMERS
    done = subprocess.run([*words, *chosen], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_the_head_as_llama_cpp_reads_it_is_named_from_its_formula():
    """Its final norm subtracts the mean; the test computes it from the formula, not from our table."""
    case = Case(layers="M*", mtp_layers="*E", seed=7)
    trace = clean(case, numpy_backend(np.float32))
    x = trace.arrays["mtp.layers.1.output"].astype(np.float64)
    weight = case.read("mtp.layers.1.final_layernorm.weight").astype(np.float64)
    spread = ((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True)
    o = (x - x.mean(-1, keepdims=True)) / np.sqrt(spread + case.cfg.layer_norm_epsilon) * weight
    logits = (o @ case.read("lm_head.weight").astype(np.float64).T).astype(np.float32)
    arrays = trace.arrays | {"mtp.final_hidden": o.astype(np.float32), "mtp.logits": logits}
    (found,) = wrong(replace(trace, arrays=arrays), case)
    assert found.unit.name == "mtp.final" and found.first.name == "mtp.final_hidden"
    assert found.causes == [named("the head's final norm is a LayerNorm, as in llama.cpp")]
    del arrays["mtp.final_hidden"]  # so only the logits remain
    (found,) = wrong(replace(trace, arrays=arrays), case)
    assert found.causes == [named("the head's final norm is a LayerNorm, as in llama.cpp")]


def tied_case() -> Case:
    """Return a model whose router has two experts with the same weights: every choice of them is a tie."""
    return Case(layers="E", length=15, seed=8, num_experts_per_tok=1)


def read_of(case):
    def read(name):
        value = np.array(case.read(name))
        if name.endswith("mixer.gate.weight"):
            value[1] = value[0]
        if name.endswith("e_score_correction_bias"):
            value[:] = 0
            value[:2] = 1  # a tie of these two: the order decides
        return value

    return read


@pytest.mark.parametrize("form", [lambda trace: trace, outside], ids=["whole", "outside"])
def test_a_near_tie_of_the_router_is_no_error(form):
    """The other of two equal experts is no error; a third expert is one."""
    from refengine.conformance.traces.record import record
    from refengine.spec.model import Model
    from refengine.spec.moe import Routing

    case = tied_case()
    model = Model.build(case.cfg, read_of(case), numpy_backend(np.float32))

    def other(number):
        def on(block, step, right, args):
            if step != "router":
                return right(*args)
            expert, weight = right(*args)
            return Routing(np.where(np.arange(expert.shape[1])[:, None] == 4, number, expert), weight)

        return on

    flipped = form(record(model, case.ids.tolist(), plant=[other(1)]))
    found = list(diagnose(flipped, case.cfg, read_of(case)))
    assert not any(f.wrong for f in found) and sum(f.ties for f in found) == case.batch
    third = form(record(model, case.ids.tolist(), plant=[other(2)]))
    found = [f for f in diagnose(third, case.cfg, read_of(case)) if f.wrong]
    assert [f.unit.name for f in found] == ["layers.0"] and not found[0].ties
    assert found[0].first.at[1] == 4


@pytest.mark.slow
def test_what_a_trace_does_not_show_is_told_apart():
    """In bfloat16, an eps of 1e-6 for 1e-5 is below rounding; one row has no padding."""
    torch_backend = pytest.importorskip("refengine.backends.pytorch").torch_backend
    case = Case(layers="M*E", length=13, batch=1)
    model_of = {
        "float32": numpy_backend(np.float32),
        "bfloat16": torch_backend("bfloat16", compute="bfloat16"),
    }
    shown = {}
    names = ["the layer's norm has eps 1e-6", "padding enters the state", CLAMP, "rotary position embedding"]
    for dtype, backend in model_of.items():
        of = Recomputation(clean(case, backend), case.cfg, case.read)
        assert of.trace.dtype == dtype
        shown[dtype] = list(exercised(of, [named(name) for name in names]).values())
    assert shown["float32"][0] > 8 > shown["bfloat16"][0] > 0
    assert shown["float32"][1] == shown["bfloat16"][1] == 0
    assert all(values[3] > 8 for values in shown.values())


def test_activations_of_another_dtype_than_asked_for_are_noted(cli, tmp_path):
    line = ["trace", "tiny", "--ids", "5 6 7", "-o", tmp_path / "t", "--backend", "cpu"]
    assert "computes in float32" not in cli(*line)[2]
    _, _, err = cli(*line, "--dtype", "bf16")
    assert "the cpu backend computes in float32: the activations have that dtype, the weights bfloat16" in err


def test_an_unknown_name_is_noted(cli, model, tmp_path):
    """Otherwise a misspelled array would not be compared, without a message."""
    assert cli("trace", model, "--ids", IDS, "-o", tmp_path / "t", "--backend", "numpy")[0] == 0
    made = load(tmp_path / "t")
    arrays = {name.replace("layers.1.attention", "layers.1.attn"): made.array(name) for name in made.arrays}
    replace(made, arrays=arrays).save(tmp_path / "t")
    code, _, err = cli("diff", tmp_path / "t", "--against", model)
    assert code == 0 and "'layers.1.attn', which is no activation of this model" in err


@pytest.fixture(scope="module")
def clean_trace():
    """Return a case of five layers and its trace, by NumPy in float32, in one call."""
    case = Case(layers="MEM*-", seed=3, batch=1, length=11)
    return case, clean(case, numpy_backend(np.float32), steps=0, cut=None)


def changed(trace, name: str, change) -> dict:
    """Return the arrays of a trace with one of them changed."""
    return dict(trace.arrays) | {name: change(np.array(trace.arrays[name]))}


@pytest.mark.parametrize(
    "name, where",
    [
        ("layers.3.output", "the stream between layers 3 and 4"),
        ("embeddings", "the stream between embeddings and layers.0"),
    ],
)
def test_a_stream_that_breaks_between_layers_is_the_first_wrong_place(clean_trace, name, where):
    """Each layer agrees with its own input, but the stream changes between two of them."""
    case, trace = clean_trace
    after = "layers.4.input" if name != "embeddings" else "layers.0.input"
    of = replace(trace, arrays=changed(trace, after, lambda a: 1.5 * a))
    kept = {n: a for n, a in of.arrays.items() if not n.startswith(after.rpartition(".")[0]) or n == after}
    outputs = {n: a for n, a in trace.arrays.items() if n == "layers.4.output"}
    first, *_ = wrong(replace(of, arrays=kept | outputs), case)
    assert first.unit.name == where and first.steps[0].of == name and not first.causes
    assert "the stream" not in " ".join(f.unit.name for f in diagnose(trace, case.cfg, case.read))


def test_a_stream_that_breaks_within_the_head_is_found():
    case = Case(layers="M", mtp_layers="*E", seed=3, batch=1, length=9)
    trace = clean(case, numpy_backend(np.float32), steps=0, cut=None)
    for name, where in (
        ("layers.0", "mtp.eh_proj and mtp.layers.0"),
        ("layers.1", "layers 0 and 1 of the head"),
    ):
        shifted = changed(trace, f"mtp.{name}.input", lambda a: 1.5 * a)
        first, *_ = wrong(replace(trace, arrays=shifted), case)
        assert first.unit.name == f"the stream between {where}"


def test_a_stream_that_is_rounded_once_more_is_not_broken(clean_trace):
    """A float32 output and its bfloat16 copy as the next input are the same stream in bfloat16."""
    case, trace = clean_trace
    rounded = changed(trace, "layers.2.input", lambda a: a.astype(DTYPES["BF16"]).astype(np.float32))
    of = replace(trace, dtype="bfloat16", arrays=rounded)
    assert not [f for f in wrong(of, case) if f.unit.kind == "stream"]
    assert [f.unit.name for f in wrong(replace(of, dtype="float32"), case) if f.unit.kind == "stream"]


def test_an_earlier_fault_is_named_before_a_number_that_is_not_finite(cli, clean_trace, tmp_path):
    case, trace = clean_trace
    write(tmp_path / "model", case.cfg, lambda row: case.read(row.name))
    arrays = changed(trace, "layers.1.output", lambda a: a + 1)
    arrays = changed(replace(trace, arrays=arrays), "layers.4.output", lambda a: a * np.nan)
    replace(trace, arrays=arrays).save(tmp_path / "t")
    code, out, err = cli("diff", tmp_path / "t", "--against", tmp_path / "model")
    assert code == 1 and "first wrong   layers.1 (experts)" in out
    assert "layers.4.output holds a number that is not finite" in err and err.count("\n") == 1
    code, out, _ = cli("diff", tmp_path / "t", "--against", tmp_path / "model", "--json")
    found = json.loads(out)
    assert code == 1 and found["first_wrong"] == "layers.1" and "not finite" in found["stopped"]


def test_a_fault_of_the_same_layer_is_named_before_a_number_that_is_not_finite(clean_trace):
    """The convolution is wrong, and the scan after it gives NaN."""
    case, trace = clean_trace
    arrays = changed(trace, "layers.2.conv", lambda a: a + 1)
    for name in ("layers.2.scan", "layers.2.gated_norm", "layers.2.output", "layers.3.input"):
        arrays = changed(replace(trace, arrays=arrays), name, lambda a: a * np.nan)
    found = []
    with pytest.raises(InputError, match=r"layers\.2\.scan holds a number that is not finite"):
        for finding in diagnose(replace(trace, arrays=arrays), case.cfg, case.read):
            found.append(finding)
    assert [f.unit.name for f in found if f.wrong] == ["layers.2"] and found[-1].first.name == "layers.2.conv"


def test_two_traces_with_a_number_that_is_not_finite_are_apart_by_that(cli, clean_trace, tmp_path):
    _, trace = clean_trace
    trace.save(tmp_path / "a")
    replace(trace, arrays=changed(trace, "layers.2.output", lambda a: a * np.nan)).save(tmp_path / "b")
    for pair in (("a", "b"), ("b", "a"), ("b", "b")):
        code, out, _ = cli("diff", *(tmp_path / name for name in pair))
        says = f"first apart   layers.2.output: {tmp_path / 'b'} holds a number that is not finite"
        assert code == 1 and says in out and "nan" not in out
    code, out, _ = cli("diff", tmp_path / "a", tmp_path / "b", "--json")
    rows = {row["name"]: row for row in json.loads(out)["arrays"]}
    assert code == 1 and "Infinity" not in out and rows["layers.2.output"]["error"] is None
    assert rows["layers.2.output"]["not_finite"] == [str(tmp_path / "b")]


def test_padding_is_not_compared_between_two_traces():
    """Values of a row after its last token are padding, and may be anything."""
    from refengine.conformance.traces.record import record
    from refengine.spec.model import Model

    case = Case(layers="M*", seed=3)
    model = Model.build(case.cfg, case.read, numpy_backend(np.float32))
    trace = record(model, [[1, 2, 3, 4, 5], [6, 7]])
    other = changed(
        trace, "layers.0.output", lambda a: np.where(np.arange(5)[:, None] < [[[5]], [[2]]], a, 9)
    )
    assert not any(step.wrong for step in compare(trace, replace(trace, arrays=other)))


def test_an_array_of_a_coarser_dtype_than_the_header_is_noted(cli, clean_trace, tmp_path):
    case, trace = clean_trace
    write(tmp_path / "model", case.cfg, lambda row: case.read(row.name))
    replace(trace, arrays=changed(trace, "layers.1.output", lambda a: a.astype(np.float16))).save(
        tmp_path / "t"
    )
    _, _, err = cli("diff", tmp_path / "t", "--against", tmp_path / "model")
    assert "'layers.1.output', stored with a larger rounding than that of float32" in err


@pytest.mark.parametrize("engine", ["numpy", "cpu", "torch"])
@pytest.mark.parametrize("recipe", ["nvfp4", "fp8"])
def test_a_clean_trace_of_packed_weights_agrees(cli, tmp_path, engine, recipe):
    """A backend that dequantizes to bfloat16 states it in the header, and is compared accordingly."""
    if engine == "torch":
        pytest.importorskip("torch")
    assert cli("quantize", "tiny", tmp_path / "q", "--no-evaluate", "--recipe", recipe, "-q")[0] == 0
    line = ["trace", tmp_path / "q", "-p", "Once upon a time", "-o", tmp_path / "t", "--backend", engine]
    for more in [], ["--dtype", "bfloat16"]:
        if more and engine == "numpy":  # which computes in float32 or float64
            continue
        assert cli(*line, *more)[0] == 0
        code, out, err = cli("diff", tmp_path / "t", "--against", tmp_path / "q")
        assert code == 0 and "agrees" in out, out + err


def test_two_traces_are_compared_array_by_array(cli, model, tmp_path):
    for name, dtype in (("a", "float32"), ("b", "float64")):
        assert cli("trace", model, "--ids", IDS, "-q", "-o", tmp_path / name, "--dtype", dtype)[0] == 0
    code, out, err = cli("diff", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0, err
    rows = json.loads(out)["arrays"]
    names = [row["name"] for row in rows]
    assert names[:3] == ["embeddings", "layers.0.input", "layers.0.norm"]
    assert names.index("layers.4.output") < names.index("final_hidden") < names.index("mtp.layers.0.norm")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    shifted = {name: b.array(name) + (name == "layers.1.attention") for name in b.arrays}
    apart = [step for step in compare(a, replace(b, arrays=shifted)) if step.wrong]
    assert apart[0].name == "layers.1.attention"
    with pytest.raises(InputError, match="different tokens"):
        compare(a, replace(b, token_ids=[[1, 2]]))


def test_two_traces_of_other_shapes_or_routings_are_not_equal(cli, clean_trace, tmp_path):
    """Sizes alone do not make arrays alike; the order of the chosen experts has no meaning."""
    name, (_, clean_trace) = "layers.1.router", clean_trace
    parts = (f"{name}.experts", f"{name}.weights")
    backwards = {part: clean_trace.array(part)[..., ::-1] for part in parts}
    reordered = replace(clean_trace, arrays=dict(clean_trace.arrays) | backwards)
    assert not any(step.wrong for step in compare(reordered, clean_trace))
    experts = clean_trace.array(f"{name}.experts")
    chosen = replace(clean_trace, arrays=dict(clean_trace.arrays) | {f"{name}.experts": (experts + 1) % 9})
    assert [step.name for step in compare(chosen, clean_trace) if step.wrong] == [name]
    for value, says in ((experts - 9, "holds no experts"), (experts + 2**20, "names expert 10485")):
        odd = replace(clean_trace, arrays=dict(clean_trace.arrays) | {f"{name}.experts": value})
        with pytest.raises(InputError, match=says):
            compare(odd, clean_trace)
    turned = changed(clean_trace, "layers.2.output", lambda a: a.swapaxes(1, 2))
    with pytest.raises(InputError, match=r"layers.2.output has the shape \[.*\] in"):
        compare(replace(clean_trace, arrays=turned), clean_trace)
    fewer = {key: a for key, a in clean_trace.arrays.items() if key != f"{name}.experts"}
    replace(clean_trace, arrays=fewer).save(tmp_path / "fewer")
    clean_trace.save(tmp_path / "all")
    code, _, err = cli("diff", tmp_path / "fewer", tmp_path / "all")
    assert code == 0 and f"holds '{name}.experts', which" in err and "lacks: not compared" in err


def test_half_of_a_routing_is_noted_and_no_text_of_a_file_controls_a_terminal(cli, model, tmp_path):
    cli("trace", model, "--ids", "3 4 5", "-q", "-o", tmp_path / "t")
    trace = load(tmp_path / "t")
    arrays = {key: trace.array(key) for key in trace.arrays if key != "layers.2.router.experts"}
    replace(trace, arrays=arrays, engine="\x1b[31mred\x07").save(tmp_path / "t")
    code, out, err = cli("diff", tmp_path / "t", "--against", model)
    assert code == 0 and "holds 'layers.2.router.weights' without the other half" in err
    assert "by [31mred\n" in out and "\x1b" not in out
    replace(trace, arrays=arrays | {"a\x1b": arrays["logits"]}).save(tmp_path / "t")
    with pytest.raises(InputError, match="is no name of an activation"):
        load(tmp_path / "t")


def test_a_clean_trace_agrees_and_another_model_is_refused(cli, model, tmp_path):
    made = cli("trace", model, "--ids", IDS, "--ids", "5 6 7", "--cut", 8, "--steps", 2, "-o", tmp_path / "t")
    assert made[0] == 0 and "arrays of 30 tokens" in made[2]
    code, out, _ = cli("diff", tmp_path / "t", "--against", model, "--mistakes")
    assert code == 0 and "2 sequences in 5 calls" in out and "departs" not in out
    assert "would show                      rotary position embedding (trap 3)" in out
    assert "not exercised by these tokens   each chunk begins with an empty state" in out
    other = random_checkpoint(tmp_path / "other", Checkpoint.open(model).config, seed=3)
    code, out, err = cli("diff", tmp_path / "t", "--against", other)
    assert code == 1 and not out and "was recorded from another model" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args, code, says",
    [
        (["trace", "tiny", "-o", "x"], 2, "give a --prompt or --ids"),
        (["trace", "tiny", "--ids", "1 x", "-o", "x"], 1, "is not a token id"),
        (["trace", "tiny", "--ids", "999999", "-o", "x"], 1, "is not in the vocabulary"),
        (["trace", "tiny", "--ids", "1", "-o", "no/such/folder/x"], 1, "cannot be saved"),
        (["trace", "tiny", "--ids", "1", "-o", "."], 1, ". cannot be saved: it is a directory"),
        (["trace", "tiny", "--ids", "1", "-o", ""], 1, "the name of the file is empty"),
        (["trace", "nowhere", "--ids", "1", "-o", "x"], 1, "nowhere"),
        (["diff", "a"], 2, "give another trace, or --against MODEL"),
        (["diff", "a", "b", "--against", "tiny"], 2, "give another trace, or --against MODEL, not both"),
        (["diff", "no-such-file", "--against", "tiny"], 1, "does not exist"),
        (["diff", ".", "--against", "tiny"], 1, "is a directory"),
    ],
)
def test_a_wrong_command_is_one_sentence(cli, tmp_path, monkeypatch, args, code, says):
    monkeypatch.chdir(tmp_path)
    got, out, err = cli(*args)
    assert got == code and not out and says in err and "Traceback" not in err
    assert code == 2 or err.count("\n") == 1

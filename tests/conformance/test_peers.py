"""Other engines, if installed, agree on whole models: llama.cpp and mlx-lm, and the files that they read."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from refengine.conformance import accuracy, peers
from refengine.conformance.cases import Case
from refengine.conformance.traces import load
from refengine.conformance.traces.diff import diagnose
from refengine.spec.mixers import MIXERS
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.tensors import table
from tests.support.shown import prepare

DOCS = Path(__file__).resolve().parents[2] / "docs"
BARS = {
    "float32": 3e-6,
    "bfloat16": 0.06,
}  # of the relative rms error of logits: of the page's largest, twice
ENGINES = list(peers.engines())
LLAMA = os.environ.get("LLAMA_CPP", "")  # a folder of llama.cpp that was built in its folder `build`


@pytest.mark.slow
@pytest.mark.parametrize("name, logits", ENGINES, ids=[name for name, _ in ENGINES])
def test_another_engine_agrees_on_whole_models(name, logits):
    column = accuracy.Column(name, lambda vector: None, lambda case: (logits(case), []))
    errors = [accuracy.model_error(accuracy.models(layers)[1], column) for layers in accuracy.MODELS]
    if name == "mlx-lm bfloat16":  # which has no experts on a processor
        assert errors[1:] == [None, None]
        del errors[1:]
    assert all(error is not None and error < BARS[name.split()[-1]] for error in errors), errors


def test_a_gguf_file_holds_every_tensor_under_the_names_of_the_page(tmp_path):
    gguf = pytest.importorskip("gguf")
    case, page = Case(layers="M*E-M"), (DOCS / "names.md").read_text()
    for weights in ("F32", "BF16"):
        peers.write_gguf(tmp_path / weights, case.cfg, case.read, weights)
        found = {t.name: t for t in gguf.GGUFReader(tmp_path / weights).tensors}
        count = sum(int(np.prod(t.shape)) for t in found.values())
        assert count == sum(row.size for row in table(case.cfg))
        for name in found:
            stem = name.replace(f"blk.{name.split('.')[1]}.", "blk.{i}.")
            for letter in "qkv":
                stem = stem.replace(f"attn_{letter}.", "attn_{q,k,v}.")
            assert (
                stem in page
                or stem.replace("ffn_up.", "ffn_{up,down}.").replace("ffn_down.", "ffn_{up,down}.") in page
            ), stem
        a = gguf.quants.dequantize(found["blk.0.ssm_a"].data, found["blk.0.ssm_a"].tensor_type)
        assert np.allclose(np.ravel(a), -np.exp(case.exact("A_log")), rtol=1e-6)
        up = found["blk.2.ffn_up_exps.weight"]
        values = gguf.quants.dequantize(up.data, up.tensor_type).reshape(9, 13, 20)
        assert np.array_equal(values[8], case.exact("experts.8.up_proj.weight", "layers.2"))


@pytest.mark.slow
@pytest.mark.skipif(not (LLAMA and shutil.which("c++")), reason="needs LLAMA_CPP=FOLDER and a C++ compiler")
def test_the_program_of_the_page_writes_a_trace_of_llama_cpp(tmp_path):
    """The program of docs/traces.md is compiled, and every layer of its traces agrees.

    First of a random model, then of the embedded one by the commands of the page.
    """
    text = (DOCS / "traces.md").read_text().split("## From llama.cpp")[1]
    program, packing = (text.split(f"```{language}\n")[1].split("```")[0] for language in ("cpp", "py"))
    (tmp_path / "trace.cpp").write_text(program)
    (tmp_path / "pack.py").write_text(packing)
    build = Path(LLAMA) / "build" / "bin"
    words = ["c++", "-std=c++17", "trace.cpp", f"-I{LLAMA}/include", f"-I{LLAMA}/ggml/include", f"-L{build}"]
    words += ["-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{build}", "-o", "trace"]
    subprocess.run(words, cwd=tmp_path, check=True)
    case = Case(layers="MEM*EM", length=23, hidden_size=64, head_dim=16, mamba_head_dim=16, ssm_state_size=32)
    peers.write_gguf(tmp_path / "case.gguf", case.cfg, case.read)
    ids = case.ids[0].tolist()
    (tmp_path / "of the case").mkdir()
    command = [str(tmp_path / "trace"), "case.gguf", "of the case", *map(str, ids)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    words = [sys.executable, "pack.py", "of the case", json.dumps(ids), "theirs.safetensors"]
    subprocess.run(words, cwd=tmp_path, check=True)
    trace = load(tmp_path / "theirs.safetensors")
    found = list(diagnose(trace, case.cfg, case.read))
    assert {f"layers.{i}" for i in range(len(case.layers))} | {"final"} == {f.unit.name for f in found}
    assert not [f for f in found if f.wrong], [(f.unit.name, f.worst) for f in found]
    commands = "\n".join(re.findall(r"^    ((?:refengine|python|\./trace) .*)$", text, re.M))
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=prepare(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0 and "agrees        every layer" in done.stdout, done.stdout + done.stderr


class Layer:
    """One layer of a model, computed by NumPy."""

    def __init__(self, model: Model, index: int):
        self.model, ((self.kind, self.w),) = model, model.layers(index, index + 1)

    def delta(self, x):
        """Return the output of the layer for the stream x [b l d], as a tensor."""
        import torch

        cfg, ops, x = self.model.cfg, self.model.backend.ops, x.numpy()
        h, _ = ops.rms_norm(x, None, self.w["norm.weight"], cfg.layer_norm_epsilon)
        state = self.model.backend.new_state(self.kind, cfg, len(x))
        return torch.from_numpy(MIXERS[self.kind](h, self.w["mixer"], cfg, state, None, ops)[0])


class AsInVLLM(Layer):
    """A layer with the interface of vLLM and SGLang: tokens in rows, and the stream in two parts."""

    def forward(self, hidden_states, residual):
        residual = hidden_states if residual is None else hidden_states + residual
        return self.delta(residual[None])[0], residual


def as_in_megatron(model: Model, index: int):
    """Return a layer with Megatron's interface: a module on [position, sequence, hidden] returning a pair."""
    from torch.nn import Module

    class AsInMegatron(Module):
        def forward(self, hidden_states, attention_mask=None):
            return hidden_states + Layer(model, index).delta(hidden_states.transpose(0, 1)).transpose(
                0, 1
            ), None

    return AsInMegatron()


def test_the_hooks_of_the_page_run_on_stand_ins(tmp_path):
    """The blocks for vLLM, SGLang and Megatron run on layers with the same interface, not on theirs."""
    torch = pytest.importorskip("torch")
    case = Case(layers="M*E-", length=11, batch=1)
    model = Model.build(case.cfg, case.read, numpy_backend(np.float32))
    text = (DOCS / "traces.md").read_text()
    names = ("vLLM and SGLang", "Megatron")
    vllm, megatron = (text.split(f"## From {name}")[1].split("```py\n")[1].split("```")[0] for name in names)
    space: dict = {"token_ids": case.ids[0].tolist()}
    x = torch.from_numpy(model.embed(case.ids))

    def agrees(path):
        trace = load(path)
        found = list(diagnose(trace, case.cfg, case.read))
        assert len(trace.arrays) == len(found) == 4 and not any(f.wrong for f in found)
        assert max(f.worst for f in found) < 0.01  # rounding of bfloat16, as stated in the header

    exec(vllm, space)
    layers = [AsInVLLM(model, i) for i in range(4)]
    space["attach"](SimpleNamespace(model=SimpleNamespace(layers=layers)))
    for tokens in (x[0, :3], x[0]):  # a warm-up of another length is left out
        hidden, residual = tokens, None
        for layer in layers:
            hidden, residual = layer.forward(hidden, residual)
    space["save"](str(tmp_path / "vllm"))
    agrees(tmp_path / "vllm")

    space["arrays"].clear()
    layers = [as_in_megatron(model, i) for i in range(4)]
    exec(megatron, space | {"model": SimpleNamespace(decoder=SimpleNamespace(layers=layers))})
    hidden = x.transpose(0, 1)
    for layer in layers:
        hidden, _ = layer(hidden_states=hidden)
    space["save"](str(tmp_path / "megatron"))
    agrees(tmp_path / "megatron")

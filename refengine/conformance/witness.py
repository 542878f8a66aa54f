"""The independent witness: outputs of transformers' `nemotron_h` for the same arrays, in any dtype.

It leaves the prediction head out, and up to 5.23 clamps dt at `time_step_min` where several tokens are read
at once (trap 1, docs/model.md); `hf_model` takes that clamp away unless asked to leave it. PyTorch and
transformers are imported when a function here is called, with a sentence where they are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from refengine.conformance.vectors import Vector
from refengine.conformance.vectors.replay import MIXER_OF
from refengine.spec.arrays import widen
from refengine.spec.config import Config, InputError
from refengine.spec.tensors import table


def available() -> bool:
    """Return whether PyTorch and transformers are installed."""
    return bool(find_spec("torch") and find_spec("transformers"))


def libraries() -> tuple[Any, Any, Any]:
    """Return the modules torch, transformers and transformers' modeling_nemotron_h; InputError without."""
    try:
        import torch
        import transformers
        from transformers.models.nemotron_h import modeling_nemotron_h as hf
    except ImportError as error:
        why = f"the witness needs PyTorch and transformers 5.8.1 or newer ({error})"
        raise InputError(f"{why}: pip install 'transformers>=5.14' torch") from None
    transformers.utils.logging.set_verbosity_error()
    return torch, transformers, hf


def version() -> str:
    """Return "transformers" and its version."""
    return f"transformers {libraries()[1].__version__}"


def hf_model(cfg: Config, read: Callable[[str], np.ndarray], dtype: str = "float32", clamp: bool = False):
    """Return their model in eager mode with our weights; read(name) is a tensor by its name in a checkpoint.

    The modules that transformers itself keeps in float32 stay so. clamp: leave their floor under dt.
    """
    torch, transformers, _ = libraries()
    config = transformers.NemotronHConfig(**cfg.to_hf())
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.NemotronHForCausalLM(config).float().eval()
    model.load_state_dict(state_dict(cfg, read), strict=True)
    if dtype != "float32":
        wide = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not name.endswith(wide or ("\0",)):
                tensor.data = tensor.data.to(getattr(torch, dtype))
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit") and not clamp:
            layer.mixer.time_step_limit = (0.0, math.inf)
    return model


def state_dict(cfg: Config, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Return the table under their names: `model.` for `backbone.`, experts stacked, no prediction head."""
    torch = libraries()[0]
    out: dict[str, Any] = {}
    stacks: dict[str, list] = {}
    for row in table(cfg):
        if row.name.startswith("mtp."):
            continue
        name, value = row.name.replace("backbone.", "model."), widen(read(row.name), np.float32)
        if ".experts." in name:
            layer, expert = name.split(".experts.")
            stacks.setdefault(f"{layer}.experts.{expert.split('.')[1]}", []).append(value)
        else:
            out[name] = torch.tensor(value)
    out |= {name: torch.tensor(np.stack(values)) for name, values in stacks.items()}
    if cfg.tie_word_embeddings:
        out["lm_head.weight"] = out["model.embeddings.weight"]
    return out


def logits(model, ids: np.ndarray, pieces: list[slice] | None = None) -> np.ndarray:
    """Return logits b l v, float32, in one call without a cache, or in pieces over their cache."""
    torch = libraries()[0]
    with torch.no_grad():
        if pieces is None:
            return model(torch.tensor(ids), use_cache=False).logits.float().numpy()
        cache, out = None, []
        for piece in pieces:
            answer = model(torch.tensor(ids[:, piece]), past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            out.append(answer.logits.float().numpy())
    return np.concatenate(out, axis=1)


class _Theirs:
    """Holds what a recording reads: the case, the dtype, and transformers' first layer with its weights."""

    def __init__(self, vector: Vector, dtype: str):
        self.torch, _, self.hf = libraries()
        self.vector, self.cfg, self.name = vector, vector.cfg, dtype
        self.dtype = getattr(self.torch, dtype)

    def give(self, *names: str, wide: bool = False):
        """Return inputs as tensors, in the dtype or in float32."""
        kind = self.torch.float32 if wide else self.dtype
        return [self.torch.tensor(np.asarray(self.vector.arrays["in." + name])).to(kind) for name in names]

    def weight(self, key: str):
        """Return a weight of the first mixer, in the dtype."""
        value = self.vector.read(f"backbone.layers.0.mixer.{key}")
        return self.torch.tensor(widen(value, np.float32)).to(self.dtype)

    @property
    def model(self):
        """Return their model of the case."""
        return hf_model(self.cfg, self.vector.read, self.name)

    @property
    def mixer(self):
        """Return their first mixer."""
        return self.model.model.layers[0].mixer


def record(vector: Vector, dtype: str = "float32") -> tuple[dict[str, np.ndarray], str] | None:
    """Return transformers' outputs of a case by name, and the name of what computed them; None without one.

    Ragged cases have none: their padding is another (on the left, and masked). Nor have exact ties of the
    router, whose choice PyTorch leaves open.
    """
    recorder = RECORDERS.get(vector.operation)
    if vector.operation == "route" and "margin" not in vector.arrays:
        return None
    if recorder is None or ("in.lengths" in vector.arrays and vector.operation != "model"):
        return None
    theirs = _Theirs(vector, dtype)
    with theirs.torch.no_grad():
        outputs, what = recorder(theirs)
    return {
        key: np.asarray(a if isinstance(a, np.ndarray) else a.float()) for key, a in outputs.items()
    }, what


def _model(t: _Theirs):
    model, ids = t.model, t.vector.arrays["in.ids"]
    out = {"logits": logits(model, ids)}
    if "*" in t.cfg.layers:  # their cache asks an attention layer how much was read
        out["one_by_one"] = logits(model, ids, [slice(i, i + 1) for i in range(ids.shape[1])])
    return out, type(model).__name__


def _mixer(t: _Theirs):
    kind, (h,), model = MIXER_OF[t.vector.operation], t.give("h"), t.model
    module, after = model.model.layers[0].mixer, {}
    if kind == "M":
        from transformers.cache_utils import DynamicCache

        cache: Any = DynamicCache(config=model.config)
        y = module(h, cache_params=cache)
        tail = cache.get_conv_state(0, state_idx=0)[..., 1 - t.cfg.conv_kernel :].transpose(1, 2)
        after = {"S": cache.get_recurrent_state(0, state_idx=0), "tail": tail}
    elif kind == "*":
        causal = t.torch.full((h.shape[1], h.shape[1]), -math.inf).triu(1).to(t.dtype)
        y = module(h, attention_mask=causal[None, None])[0]
    else:
        y = module(h)
    return {"y": y, **after}, type(module).__name__


def _scan(t: _Theirs):
    low, high = t.vector.constants["dt_limit"]
    x, dt, B, C = t.give("x", "dt", "B", "C")
    (S,) = t.give("S", wide=True)
    A = -t.torch.exp(t.weight("A_log").float())
    y, S = t.hf.mamba2_chunk_scan(
        x, dt, A, B, C, t.cfg.chunk_size, D=t.weight("D"), dt_bias=t.weight("dt_bias"), dt_softplus=True,
        initial_states=S, dt_limit=(low, math.inf if high is None else high), return_final_states=True,
    )  # fmt: skip
    return {"y": y, "S": S}, "mamba2_chunk_scan"


def _conv(t: _Theirs):
    x, tail = t.give("x", "tail")
    window = t.torch.cat([tail, x], dim=1).transpose(1, 2)
    weight, bias = t.weight("conv1d.weight")[:, 0], t.weight("conv1d.bias")
    y = t.hf.causal_conv1d_fn(window, weight, bias, activation="silu")[..., -x.shape[1] :].transpose(1, 2)
    return {"y": y, "tail": window[..., x.shape[1] :].transpose(1, 2)}, "causal_conv1d_fn"


def _gated_norm(t: _Theirs):
    y, z = t.give("y", "z")
    module = t.mixer.norm
    return {"u": module(y, z)}, type(module).__name__


def _norm(t: _Theirs):
    x, delta = t.give("x", "delta")
    module = t.model.model.layers[0].norm
    return {"y": module(x + delta), "x": x + delta}, type(module).__name__


def _route(t: _Theirs):
    (h,), module = t.give("h"), t.mixer.gate
    _, weight, expert = module(h)
    rows = t.torch.zeros(len(weight), t.cfg.n_routed_experts).scatter_(1, expert, weight.float())
    return {"weights": rows.reshape(*h.shape[:2], -1)}, type(module).__name__


def _experts(t: _Theirs):
    (h, u), module = t.give("h", "u"), t.mixer
    _, weight, expert = module.gate(h)
    r = module.experts(u.reshape(-1, u.shape[-1]), expert, weight)
    return {"r": r.reshape(u.shape)}, type(module.experts).__name__


def _mlp(t: _Theirs):
    (h,), module = t.give("h"), t.mixer
    return {"y": module(h)}, type(module).__name__


def _attention(t: _Theirs):
    (q, k, v), (k0, v0) = t.give("q", "k", "v"), t.give("k_before", "v_before")
    k, v, module = t.torch.cat([k0, k], 1), t.torch.cat([v0, v], 1), t.mixer
    total, length = k.shape[1], q.shape[1]
    mask = t.torch.full((length, total), -math.inf).triu(1 + total - length).to(t.dtype)[None, None]
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    y, _ = t.hf.eager_attention_forward(module, q, k, v, mask, module.scaling)
    return {"y": y}, "eager_attention_forward"


def _linear(t: _Theirs):
    (x,) = t.give("x")
    return {"y": t.torch.nn.functional.linear(x, t.weight("in_proj.weight"))}, "torch.nn.functional.linear"


def _head(t: _Theirs):
    (h,) = t.give("h")
    return {"logits": t.model.lm_head(h)}, "Linear"


RECORDERS: dict[str, Callable] = {
    "model": _model,
    **dict.fromkeys(MIXER_OF, _mixer),
    "ssd_scan": _scan,
    "causal_conv": _conv,
    "gated_rms_norm": _gated_norm,
    "rms_norm": _norm,
    "route": _route,
    "experts": _experts,
    "mlp": _mlp,
    "attention": _attention,
    "linear": _linear,
    "logits": _head,
}

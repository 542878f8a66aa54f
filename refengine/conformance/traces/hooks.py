"""Recording a trace of transformers' own model, as it is shipped, through hooks on its modules.

The convolution and the scan have no module of their own: the scan is seen as what the gated norm reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refengine.conformance.traces import Trace
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config, InputError

ONE = {
    "M": {"in_proj": "in_proj", "norm": "gated_norm", "out_proj": "out_proj"},
    "*": {"o_proj": "o_proj"},
    "E": {
        "shared_experts": "shared", "fc1_latent_proj": "fc1_latent_proj", "experts": "experts",
        "fc2_latent_proj": "fc2_latent_proj",
    },
    "-": {},
}  # fmt: skip


def trace_of_transformers(
    directory: str | Path,
    cfg: Config,
    prompts: Sequence[Sequence[int]],
    cut: int | None = None,
    steps: int = 0,
    dtype: str = "float32",
    clamp: bool = True,
    **header,
) -> Trace:
    """Return the trace of transformers' model of a directory; the arguments are those of `record.record`.

    clamp: leave its clamp of dt in place (trap 1). Its right-padded batches do not decode, so prompts must be
    equally long. InputError where transformers is missing, or cannot load the model.
    """
    if len({len(ids) for ids in prompts}) > 1:
        raise InputError("transformers is traced with prompts of one length: give one prompt, or equal ones")
    model, version = load(directory, dtype)
    if not clamp:
        release(model)
    said = {"engine": f"transformers {version}{'' if clamp else ', dt not clamped'}", "dtype": dtype}
    try:
        return trace_of(model, cfg, prompts, cut, steps, **(said | header))
    except Exception as error:  # of any kind: 5.14 has no dense layers, say
        first = " ".join(str(error).split())[:200]
        raise InputError(f"transformers {version} fails: {type(error).__name__}: {first}") from error


def load(directory: str | Path, dtype: str):
    """Return transformers' model in evaluation mode, and its version."""
    try:
        import torch
        import transformers

        known = hasattr(transformers, "NemotronHForCausalLM")
    except ModuleNotFoundError as error:
        raise InputError(f"--from transformers needs {error.name}: pip install torch transformers") from None
    except ImportError as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(f"transformers cannot be imported: {first}") from None
    if not known:
        raise InputError(f"transformers {transformers.__version__} has no NemotronHForCausalLM: update it")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        said, _ = transformers.NemotronHConfig.get_config_dict(directory, local_files_only=True)
        if "hybrid_override_pattern" in said:  # beside which 5.14 does not read the older names of the list
            said.pop("layers_block_type", None)
        config = transformers.NemotronHConfig.from_dict(said)
        config._attn_implementation = config._experts_implementation = "eager"
        model = transformers.NemotronHForCausalLM.from_pretrained(
            directory, config=config, dtype=getattr(torch, dtype), local_files_only=True
        )
    except Exception as error:  # of any kind: its config classes validate with classes of their own
        first = " ".join(str(error).split())[:200]
        raise InputError(
            f"transformers {transformers.__version__} cannot load {directory}: {first}"
        ) from None
    return model.eval(), transformers.__version__


def release(model) -> None:
    """Take the clamp of dt out of every Mamba layer of transformers' model."""
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, math.inf)
        if hasattr(layer.mixer, "time_step_min"):  # transformers 5.14
            layer.mixer.time_step_min = 0.0


def trace_of(model, cfg: Config, prompts, cut: int | None = None, steps: int = 0, **header) -> Trace:
    """Return the trace of a loaded NemotronHForCausalLM."""
    import torch

    rows, parts = [list(ids) for ids in prompts], dict[str, list[np.ndarray]]()
    handles = hooks(model, cfg, parts)
    calls: list[list[int]] = []
    cache: Any = None
    at = 0
    try:
        while at < len(rows[0]) or len(calls) == 0:
            new = [row[at : at + (cut or len(row))] for row in rows]
            at += len(new[0])
            answer, cache = _call(model, new, cache)
            calls.append([len(ids) for ids in new])
        for _ in range(steps):
            new = [[int(token)] for token in answer.logits[:, -1].argmax(-1)]
            rows = [row + token for row, token in zip(rows, new, strict=True)]
            answer, cache = _call(model, new, cache)
            calls.append([1] * len(rows))
    finally:
        for handle in handles:
            handle.remove()
    arrays = {name: np.concatenate(each, axis=1) for name, each in parts.items()}
    with torch.no_grad():
        for i, kind in enumerate(cfg.layers):
            if kind == "M" and (found := states(cache, i)):
                arrays[f"layers.{i}.S"], tail = found[0], found[1].swapaxes(1, 2)
                arrays[f"layers.{i}.tail"] = tail[:, max(0, tail.shape[1] - cfg.conv_kernel + 1) :]
    return Trace("the trace", rows, calls, header.pop("dtype", "float32"), arrays, **header)


def _call(model, rows, cache):
    import torch

    with torch.no_grad():
        answer = model(torch.tensor(rows), past_key_values=cache, use_cache=True)
    return answer, answer.past_key_values


def states(cache: Any, layer: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return S and the window of the convolution of a Mamba layer [b c k], or None."""
    if hasattr(cache, "get_recurrent_state"):
        pair = cache.get_recurrent_state(layer, state_idx=0), cache.get_conv_state(layer, state_idx=0)
    else:
        held = getattr(cache, "layers", [None] * (layer + 1))[layer]
        pair = getattr(held, "recurrent_states", None), getattr(held, "conv_states", None)
    if any(not hasattr(each, "detach") for each in pair):
        return None
    return host(pair[0]), host(pair[1])


def host(tensor) -> np.ndarray:
    """Return a copy of a tensor as an array on the host."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(DTYPES["BF16"]).copy()
    return np.array(tensor.numpy())


def hooks(model, cfg: Config, parts: dict[str, list[np.ndarray]]) -> list:
    """Register hooks that store activations by name, an array for each call; return their handles."""
    handles = []

    def keep(name: str, value) -> None:
        parts.setdefault(name, []).append(host(value))

    def output(module, name: str) -> None:
        handles.append(module.register_forward_hook(lambda m, args, result: keep(name, result)))

    def given(module, name: str, count: int) -> None:
        """Keep the first argument, as [b l ...]."""

        def hook(m, args, kwargs):
            value = args[0] if args else kwargs["hidden_states"]
            keep(name, value.reshape(value.shape[0], -1, count))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    body, d = model.model, cfg.hidden_size
    output(body.embeddings, "embeddings")
    for i, (kind, layer) in enumerate(zip(cfg.layers, body.layers, strict=True)):
        name, mixer = f"layers.{i}", layer.mixer
        given(layer, f"{name}.input", d)
        output(layer, f"{name}.output")
        output(layer.norm, f"{name}.norm")
        for module, step in ONE[kind].items():
            if kind != "E":
                output(getattr(mixer, module), f"{name}.{step}")
        if kind == "M":
            given(mixer.norm, f"{name}.scan", cfg.mamba_inner)
        elif kind == "*":
            qkv: list = []
            for module in (mixer.q_proj, mixer.k_proj, mixer.v_proj):
                handles.append(module.register_forward_hook(_gathered(f"{name}.qkv_proj", qkv, keep)))
            given(mixer.o_proj, f"{name}.attention", cfg.num_attention_heads * cfg.head_dim)
        elif kind == "E":
            handles += _experts(mixer, name, cfg, parts)
        elif kind == "-":
            output(mixer, f"{name}.mlp")
    output(body.norm_f, "final_hidden")
    output(model.lm_head, "logits")
    return handles


def _gathered(name: str, found: list, keep):
    """Return a hook that keeps the results of three projections as one."""

    def hook(module, args, result):
        import torch

        found.append(result)
        if len(found) == 3:
            keep(name, torch.cat(found, dim=-1))
            found.clear()

    return hook


def _experts(mixer, name: str, cfg: Config, parts: dict) -> list:
    """Register hooks on a layer of experts, whose parts see all tokens as rows; return their handles."""
    shape: list[tuple] = []

    def keep(step: str, value) -> None:
        value = value.reshape(*shape[-1], -1)
        parts.setdefault(f"{name}.{step}", []).append(host(value))

    def before(module, args, kwargs):
        shape.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    def route(module, args, result):
        keep("router.weights", result[1])
        keep("router.experts", result[2])

    handles = [
        mixer.register_forward_pre_hook(before, with_kwargs=True),
        mixer.gate.register_forward_hook(route),
    ]
    for module, step in ONE["E"].items():
        if cfg.moe_latent_size or "latent" not in step:
            hook = lambda m, args, result, step=step: keep(step, result)  # noqa: E731
            handles.append(getattr(mixer, module).register_forward_hook(hook))
    return handles

"""The independent witness: transformers' `nemotron_h`, reading the same arrays as the spec.

It leaves the prediction head out, and up to 5.23 clamps dt at `time_step_min` where several tokens are read
at once (trap 1, docs/model.md); `theirs` takes that clamp away unless asked to leave it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.utils import logging

from refengine.spec.arrays import widen
from refengine.spec.config import Config
from refengine.spec.tensors import table

logging.set_verbosity_error()


def theirs(cfg: Config, read, clamp: bool = False) -> NemotronHForCausalLM:
    """Their model in float32, in eager mode, with our weights."""
    config = NemotronHConfig(**cfg.to_hf())
    config._attn_implementation = config._experts_implementation = "eager"
    model = NemotronHForCausalLM(config).float().eval()
    model.load_state_dict(state_dict(cfg, read), strict=True)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit") and not clamp:
            layer.mixer.time_step_limit = (0.0, math.inf)
    return model


def state_dict(cfg: Config, read) -> dict[str, torch.Tensor]:
    """The table under their names: `model.` for `backbone.`, experts stacked, no prediction head."""
    out, stacks = {}, {}
    for row in table(cfg):
        name, value = row.name.replace("backbone.", "model."), widen(read(row.name), np.float32)
        if ".experts." in name:
            layer, expert = name.split(".experts.")
            matrix = expert.split(".")[1]
            stacks.setdefault(f"{layer}.experts.{matrix}", []).append(value)
        elif not name.startswith("mtp."):
            out[name] = torch.tensor(value)
    out |= {name: torch.tensor(np.stack(values)) for name, values in stacks.items()}
    if cfg.tie_word_embeddings:
        out["lm_head.weight"] = out["model.embeddings.weight"]
    return out


def logits(model: NemotronHForCausalLM, ids: np.ndarray, pieces: list[slice] | None = None) -> np.ndarray:
    """[b l v], in one call without a cache, or in pieces over their cache."""
    with torch.no_grad():
        if pieces is None:
            return model(torch.tensor(ids), use_cache=False).logits.numpy()
        cache, out = None, []
        for piece in pieces:
            answer = model(torch.tensor(ids[:, piece]), past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            out.append(answer.logits.numpy())
    return np.concatenate(out, axis=1)

"""Watching a model: every verb's call is seen, with the layer and the step that it belongs to.

A verb is identified by its weight: `linear` with the weight of layers.3's `out_proj` is the step `out_proj`
of layers.3. The attention and the sum over ranks have no weight, and belong to the layer of the verb before
them. So any backend can be watched: its own functions run, and what they return is seen on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from refengine.spec.model import Model
from refengine.spec.ops import Ops

On = Callable[[str, str, Callable, tuple], Any]  # (block, step, the verb, its arguments) -> its result
WEIGHT_AT = {
    "embed": 1, "linear": 1, "linear_pair": 2, "rms_norm": 2, "causal_conv": 1, "ssd_scan": 2,
    "gated_rms_norm": 2, "route": 1, "experts": 1, "mlp": 1, "logits": 1,
}  # fmt: skip
STEPS = {  # the steps of each kind of layer, in the order of the computation
    "M": ("norm", "in_proj", "conv", "scan", "gated_norm", "out_proj", "output"),
    "*": ("norm", "qkv_proj", "attention", "o_proj", "output"),
    "E": ("norm", "router", "shared", "fc1_latent_proj", "experts", "fc2_latent_proj", "output"),
    "-": ("norm", "mlp", "output"),
}
STEP_OF = {  # by the last part of a group's name
    "in_proj.weight": "in_proj", "conv1d.weight": "conv", "A_log": "scan", "out_proj.weight": "out_proj",
    "qkv_proj": "qkv_proj", "o_proj.weight": "o_proj", "gate.weight": "router", "experts": "experts",
    "shared_experts.up_proj.weight": "shared", "fc1_latent_proj.weight": "fc1_latent_proj",
    "fc2_latent_proj.weight": "fc2_latent_proj", "up_proj.weight": "mlp", "embeddings.weight": "embeddings",
    "lm_head.weight": "logits", "norm_f.weight": "norm_f", "enorm.weight": "enorm", "hnorm.weight": "hnorm",
    "eh_proj.weight": "eh_proj", "final_layernorm.weight": "final_layernorm", "norm.weight": "norm",
}  # fmt: skip
VERB_OF = {  # of the steps that have a verb of their own
    "conv": "causal_conv", "scan": "ssd_scan", "gated_norm": "gated_rms_norm", "attention": "attention",
    "router": "route", "experts": "experts", "shared": "mlp", "mlp": "mlp", "embeddings": "embed",
    "logits": "logits", "eh_proj": "linear_pair", "norm": "rms_norm",
}  # fmt: skip


def steps_of(weights: dict) -> dict[int, tuple[str, str]]:
    """Return {id of a placed weight: (block, step)}, of weights as `Model.weights` holds them."""
    named = {}
    for block, groups in weights.items():
        for group, weight in groups.items():
            if group == "mixer":
                for key, inner in weight.items():
                    step = "gated_norm" if key == "norm.weight" else STEP_OF.get(key)
                    named[id(inner)] = (block, step) if step else None
            else:
                named[id(weight)] = (block, STEP_OF[group])
    return {key: found for key, found in named.items() if found}


def watched_ops(ops: Ops, weights: dict, on: On) -> Ops:
    """Return verbs that call `on` in place of each verb of `ops` that reads one of these weights.

    A tied embedding and the output layer have one weight, and are distinguished by the verb.
    """
    named, here = steps_of(weights), [""]

    def watch(verb: str, right: Callable) -> Callable:
        def call(*args, **kwargs):
            run = (lambda *a: right(*a, **kwargs)) if kwargs else right
            if verb == "attention":
                return on(here[0], "attention", run, args)
            if verb == "all_reduce":
                return on(here[0], "all_reduce", run, args)
            found = named.get(id(args[WEIGHT_AT[verb]]))
            if found is None:
                return run(*args)
            here[0] = found[0]
            step = {"embed": "embeddings", "logits": "logits"}.get(verb, found[1])
            return on(found[0], step, run, args)

        return call

    return replace(ops, **{verb: watch(verb, right) for verb, right in ops})


def watched(model: Model, ons: Iterable[On]) -> Model:
    """Return a model whose every verb goes through each of `ons`, the last of them outermost.

    It has no compiled step: a whole step in one call shows nothing of what is inside.
    """
    ops = model.backend.ops
    for on in ons:
        ops = watched_ops(ops, model.weights, on)
    return replace(
        model,
        backend=replace(model.backend, ops=ops, step=None, step_of_ranks=None, verify=None, predict=None),
    )

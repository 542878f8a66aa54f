"""The metadata of a GGUF file -> config.json, with the keys that a configuration has.

Kinds of layers come from the tensors that each block holds. The chunk size, which decides the order of a sum,
is CHUNK, except in files that refengine has written. llama.cpp's converter writes a context of 1048576 for
every model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from refengine.checkpoint.gguf.texts import end_ids, shortest
from refengine.spec.config import InputError
from refengine.untrusted import shown

ARCHITECTURES = ("nemotron_h", "nemotron_h_moe")
CHUNK, OWN_CHUNK = 128, "refengine.chunk_size"
KINDS = {"ssm_in": "M", "ffn_up_exps": "E", "ffn_gate_inp": "E", "attn_q": "*", "ffn_up": "-"}  # by a tensor
HEAD = "*E"  # the layers of the prediction head
SIZES = {  # keys of config.json -> metadata, without the name of the architecture
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
    "mamba_num_heads": "ssm.time_step_rank",
    "ssm_state_size": "ssm.state_size",
    "n_groups": "ssm.group_count",
    "conv_kernel": "ssm.conv_kernel",
    "head_dim": "attention.key_length",
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
OF_LAYERS = {  # a number, or one for each layer, 0 where it has no meaning
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
NEUTRAL = {  # keys that change what a model computes, and the values that change nothing
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "expert_gating_func": (0, 2),
}
BLOCK = re.compile(r"blk\.(\d{1,5})\.(\w+)")


class Metadata:
    """Gives the values of a file's keys, checked; InputError names the key."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values
        self.arch = values.get("general.architecture")
        if not isinstance(self.arch, str) or self.arch not in ARCHITECTURES:
            named = isinstance(self.arch, str) and self.arch
            what = f"has the architecture {shown(self.arch)}" if named else "names no architecture"
            raise InputError(f"{path} {what}; refengine reads {' and '.join(ARCHITECTURES)}")

    def get(self, key: str) -> Any:
        """Return the value of a key of the architecture, or None."""
        return self.values.get(f"{self.arch}.{key}")

    def whole(self, key: str, meaning: int | None = None) -> int | None:
        """Return a whole number, or `meaning` where the key is absent."""
        value = self.get(key)
        if value is not None and type(value) is not int:
            raise self.wrong(key, "is not a whole number")
        return meaning if value is None else value

    def of_layers(self, key: str) -> list[int]:
        """Return a whole number, or one for each layer, as a list."""
        value = self.get(key)
        if value is None:
            return []
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            return value.tolist()
        if type(value) is not int:
            raise self.wrong(key, "is neither a whole number nor a list of them")
        return [value]

    def one_of_layers(self, key: str) -> int | None:
        """Return the number that all layers share that have one; None where there is none."""
        numbers = sorted(set(self.of_layers(key)) - {0})
        if len(numbers) > 1:
            raise self.wrong(key, "has layers of several widths: not supported")
        return numbers[0] if numbers else None

    def real(self, key: str) -> float | None:
        """Return a number: the shortest decimal of a float32."""
        value = self.get(key)
        if value is not None and type(value) not in (int, float):
            raise self.wrong(key, "is not a number")
        return None if value is None else shortest(value)

    def wrong(self, key: str, what: str) -> InputError:
        """Return the error for a value."""
        value = self.get(key)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        return InputError(f"{self.path}: {self.arch}.{key} = {shown(value)} {what}")


def config_of(path: Path, values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return config.json of the metadata `values`; `shapes` of the tensors by their names in the file."""
    meta = Metadata(path, values)
    for key, neutral in NEUTRAL.items():
        if (value := meta.get(key)) is not None and not (type(value) in (int, float) and value in neutral):
            raise meta.wrong(key, "is not supported: it would change what the model computes")
    trunk, head = layers_of(meta, shapes)
    hf: dict[str, Any] = {ours: meta.whole(key) for ours, key in SIZES.items()}
    hf |= {ours: meta.one_of_layers(key) for ours, key in OF_LAYERS.items()}
    hf |= {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": trunk,
        "chunk_size": values.get(OWN_CHUNK, CHUNK),
    }
    if head:
        hf |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": HEAD}
    eps = meta.real("attention.layer_norm_rms_epsilon")
    hf["layer_norm_epsilon"] = meta.real("attention.layer_norm_epsilon") if eps is None else eps
    if hf["head_dim"] is None:
        hf["head_dim"] = _head_dim(shapes, hf["num_attention_heads"])
    hf["mamba_head_dim"] = _mamba_head_dim(meta, hf["mamba_num_heads"])
    if meta.whole("attention.value_length", hf["head_dim"]) != hf["head_dim"]:
        raise meta.wrong("attention.value_length", f"is not key_length = {hf['head_dim']}: not supported")
    if "E" in trunk + (HEAD if head else ""):
        hf["routed_scaling_factor"] = meta.real("expert_weights_scale")
        hf["norm_topk_prob"] = meta.get("expert_weights_norm")
        hf["moe_latent_size"] = meta.whole("moe_latent_size")
        if "-" not in trunk:
            del hf["intermediate_size"]
        if (hf["n_group"] or 1) > 1 and hf["topk_group"] is None:
            raise meta.wrong("expert_group_count", "needs expert_group_used_count, which is not there")
    hf["tie_word_embeddings"] = "output.weight" not in shapes
    embedding = shapes.get("token_embd.weight", (0,))
    hf["vocab_size"] = meta.whole("vocab_size", embedding[0]) if len(embedding) < 2 else embedding[0]
    for ours, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        hf[ours] = values.get(f"tokenizer.ggml.{key}_token_id")
    hf["eos_token_id"] = end_ids(values)
    return {key: value for key, value in hf.items() if value is not None}


def layers_of(meta: Metadata, shapes: dict[str, tuple[int, ...]]) -> tuple[str, bool]:
    """Return the letters of the trunk's layers, and whether there is a prediction head."""
    count, heads = meta.whole("block_count"), meta.whole("nextn_predict_layers", 0)
    if count is None or heads is None or not 0 <= heads < count <= 4096:
        raise meta.wrong("block_count", f"with {shown(heads)} prediction heads is no number of layers")
    if heads > 1:
        raise meta.wrong("nextn_predict_layers", "is more than the one prediction head that is supported")
    kinds: dict[int, set[str]] = {}
    for name in shapes:
        if (found := BLOCK.match(name)) and found[2] in KINDS:
            kinds.setdefault(int(found[1]), set()).add(KINDS[found[2]])
    trunk = ""
    for layer in range(count - heads):
        letters = kinds.get(layer, set())
        if len(letters) != 1:
            what = "tensors of several kinds of layers" if letters else "no tensors of a known kind of layer"
            raise InputError(f"{meta.path} has {what} in block {layer} of {count}")
        trunk += letters.pop()
    _check_lists(meta, trunk)
    return trunk, heads == 1


def _check_lists(meta: Metadata, trunk: str) -> None:
    """Raise InputError where a list of the metadata gives a layer another kind than its tensors."""
    for key, kinds in (("attention.head_count_kv", "*"), ("feed_forward_length", "E-")):
        numbers = meta.of_layers(key)
        if len(numbers) < 2:
            continue
        numbers += [0] * len(trunk)
        if wrong := [i for i, kind in enumerate(trunk) if (numbers[i] > 0) != (kind in kinds)]:
            raise meta.wrong(key, f"does not fit the tensors of block {wrong[0]}")


def _head_dim(shapes: dict[str, tuple[int, ...]], heads: int | None) -> int | None:
    """Return the width of an attention head, from the rows of a query projection."""
    rows = next((shape[0] for name, shape in shapes.items() if name.endswith(".attn_q.weight")), 0)
    return rows // heads if heads and heads > 0 and rows and rows % heads == 0 else None


def _mamba_head_dim(meta: Metadata, heads: int | None) -> int | None:
    """Return the width of a Mamba head."""
    inner = meta.whole("ssm.inner_size")
    if not inner or not heads:
        return None
    if inner % heads:
        raise meta.wrong("ssm.inner_size", f"is no multiple of ssm.time_step_rank = {heads}")
    return inner // heads

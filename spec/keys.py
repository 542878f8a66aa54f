"""Chapter 1. The keys: what `config.json` may say of a model, and what each word of it means.

    required   by some kind of layer: its absence is an error, for no default describes a release
    optional   its absence has one stated meaning
    fixed      the family has one value; another would be another model
    spellings  of the list of layers: several, with one meaning
    derived    counted from other keys, even where it stands and is stale
    ignored    for training or for another program

Releases spell their layers in three ways; here they become a string with one letter a layer:

    M  Mamba-2        *  attention        E  experts (MoE)        -  dense MLP

Nemotron 3 Nano begins `MEMEM*EMEMEM*E`. After this chapter nobody asks how a release spelled a key.
Facts and sources: docs/model.md, "Configuration".
"""

from __future__ import annotations

import math
from reprlib import repr as shown  # a value of config.json in a sentence: short, whatever it is

KINDS = "M*E-"
LETTER_OF = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
NAME_OF = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


class InputError(ValueError):
    """The input is wrong, not the program; its message is one sentence that a user can act on."""


# What each key means to us. REQUIRED: by which layer letters ("M*E-" means always).
REQUIRED = {
    "hidden_size": "M*E-", "vocab_size": "M*E-",
    "max_position_embeddings": "M*E-", "layer_norm_epsilon": "M*E-",
    "mamba_num_heads": "M", "mamba_head_dim": "M", "ssm_state_size": "M", "n_groups": "M",
    "conv_kernel": "M", "chunk_size": "M",
    "num_attention_heads": "*", "num_key_value_heads": "*", "head_dim": "*",
    "n_routed_experts": "E", "num_experts_per_tok": "E", "moe_intermediate_size": "E",
    "moe_shared_expert_intermediate_size": "E", "routed_scaling_factor": "E",
    "intermediate_size": "-",
}  # fmt: skip
REAL = ("layer_norm_epsilon", "routed_scaling_factor")  # the others are integers
# OPTIONAL: a missing key has this meaning.
OPTIONAL = {
    "moe_latent_size": None,             # experts work at full width
    "n_group": 1, "topk_group": 1,       # routing is not limited to groups of experts
    "norm_topk_prob": True,
    "time_step_limit": (0.0, math.inf),  # dt is not clamped (trap 1: time_step_min/max only initialise)
    "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": (), "pad_token_id": None,
    "dtype": "bfloat16",                 # as the file says it was saved; each tensor's own dtype counts
}  # fmt: skip
# FIXED: the family has one value; another would be another model, and is refused.
FIXED = {
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "use_bias": False, "mamba_proj_bias": False, "use_conv_bias": True, "sliding_window": None,
    "n_shared_experts": 1,
}  # fmt: skip
# SPELLINGS of the layers, and of the layers of the prediction head; a list decides over a pattern.
SPELLINGS = {
    "layers_block_type",
    "layer_types",
    "hybrid_override_pattern",
    "num_nextn_predict_layers",
    "mtp_layers_block_type",
    "mtp_hybrid_override_pattern",
}
# DERIVED from other keys, even where it stands and is stale.
DERIVED = {"num_hidden_layers"}
# IGNORED: for training, initialisation, or another program; they do not change what the model computes.
# (A key that stands in no table here is ignored too; a test holds every key of a release against them.)
IGNORED = {
    "expand", "rope_theta", "partial_rotary_factor", "attention_dropout", "hidden_dropout",
    "initializer_range", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual",
    "residual_in_fp32", "num_logits_to_keep", "use_mamba_kernels", "use_cache", "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap", "output_router_logits", "auto_map", "architectures",
    "transformers_version", "model_type",
}  # fmt: skip
# ALIASES: older spellings. Where both are present the older one wins, as it does in transformers.
ALIASES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor", "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias", "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts", "norm_eps": "layer_norm_epsilon", "torch_dtype": "dtype",
}  # fmt: skip


def read(hf: dict) -> dict:
    """A parsed `config.json` as the fields of a Config, all spellings resolved; InputError names a key."""
    if not isinstance(hf, dict):
        raise InputError("config.json does not hold a JSON object")
    model_type = hf.get("model_type")
    if model_type != "nemotron_h":
        hint = " (per-layer widths are not supported)" if model_type == "nemotron_h_puzzle" else ""
        raise InputError(f"model_type {shown(model_type)} is not supported{hint}: refengine runs nemotron_h")
    eps, also = hf.get("norm_eps"), hf.get("layer_norm_epsilon")
    if eps is not None and also is not None and eps != also:
        raise InputError("config.json gives layer_norm_epsilon and norm_eps different values")
    hf = hf | {new: hf[old] for old, new in ALIASES.items() if hf.get(old) is not None}
    hf = {key: value for key, value in hf.items() if value is not None}
    for key, only in FIXED.items():
        if hf.get(key, only) != only:
            raise InputError(f"{key} = {shown(hf[key])} is not supported: nemotron_h has {only!r}")
    layers = _letters(hf, ("layers_block_type", "layer_types"), "hybrid_override_pattern")
    if not layers:
        raise InputError("config.json has neither layers_block_type nor hybrid_override_pattern")
    heads = hf.get("num_nextn_predict_layers", 0)
    if heads not in (0, 1):
        raise InputError(f"num_nextn_predict_layers = {shown(heads)} is not supported: 0 and 1 are")
    mtp = (_letters(hf, ("mtp_layers_block_type",), "mtp_hybrid_override_pattern") or "*E") if heads else ""
    for key, letters in REQUIRED.items():
        if key not in hf and set(letters) & set(layers + mtp):
            who = "the model" if letters == KINDS else f"its {NAME_OF[letters]} layers"
            raise InputError(f"config.json lacks {key}, which {who} cannot do without")
    out = {"layers": layers, "mtp_layers": mtp}
    out |= {key: hf[key] for key, letters in REQUIRED.items() if set(letters) & set(layers + mtp)}
    out |= {key: hf.get(key, meaning) for key, meaning in OPTIONAL.items()}
    out["time_step_limit"] = tuple(_number(v) for v in _listed(out["time_step_limit"]))
    out["eos_token_id"] = tuple(_listed(out["eos_token_id"]))
    return out


def _letters(hf: dict, list_keys: tuple[str, ...], pattern_key: str) -> str:
    for key in list_keys:
        if names := hf.get(key):
            if not isinstance(names, list):
                raise InputError(f"{key} = {shown(names)} is not a list of layer kinds")
            if bad := [name for name in names if not isinstance(name, str) or name not in LETTER_OF]:
                known = ", ".join(LETTER_OF)
                raise InputError(f"{key} has the layer kind {shown(bad[0])}; known are {known}")
            return "".join(LETTER_OF[name] for name in names)
    pattern = hf.get(pattern_key, "")
    if not isinstance(pattern, str) or set(pattern) - set(KINDS):
        raise InputError(f"{pattern_key} = {shown(pattern)} has letters other than {' '.join(KINDS)}")
    return pattern


def _listed(value):
    return value if isinstance(value, (list, tuple)) else [value]


def _number(value) -> float:
    """JSON cannot write infinity: it arrives as a float, a string, or {"__float__": "Infinity"}."""
    try:
        return float(value["__float__"] if isinstance(value, dict) else value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise InputError(f"time_step_limit holds {shown(value)}, which is not a number") from None

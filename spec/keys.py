"""Chapter 1. The keys: every key of `config.json` that is known, and its effect.

    required   by some kind of layer: its absence is an error, because no default describes a release
    optional   its absence has one stated meaning
    fixed      one value in the whole family; any other is refused
    spellings  the list of the kinds of the layers, under several keys with one meaning
    derived    computed from other keys; its own value is not read, because it may be stale
    ignored    for training or for another program
    refused    known to change results, and not supported: only a neutral value is accepted
    aliases    other names of the keys above

Releases spell their layers in three ways; here they become a string with one letter a layer:

    M  Mamba-2        *  attention        E  experts (MoE)        -  dense MLP

Nemotron 3 Nano begins `MEMEM*EMEMEM*E`. Later chapters see only the normalised names.
Facts and sources: docs/model.md, "Configuration".
"""

from __future__ import annotations

import math
from reprlib import repr as shown  # a value of config.json in a sentence: short, whatever it is
from typing import Any

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
    """Raised where the input is wrong, not the program, with one sentence on what to do about it."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text that is neither empty nor a row of =, else its class name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip(" =")), type(error).__name__)


# REQUIRED: the letters of the layers that need a key ("M*E-": every model).
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
OPTIONAL: dict[str, Any] = {
    "moe_latent_size": None,             # experts work at full width
    "n_group": 1, "topk_group": 1,       # experts are not in groups (n_groups, with s, is of Mamba heads)
    "norm_topk_prob": True,
    "time_step_limit": (0.0, math.inf),  # dt is not clamped (trap 1: time_step_min/max only initialise)
    "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": (), "pad_token_id": None,
    "dtype": "bfloat16",                 # as the file says it was saved; each tensor's own dtype counts
}  # fmt: skip
# FIXED: one value in the whole family; any other is refused.
FIXED: dict[str, Any] = {
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
# DERIVED from other keys; its own value is not read.
DERIVED = {"num_hidden_layers"}
# IGNORED: for training, initialisation, or another program; they do not change what the model computes.
# (A key in no table is ignored too, with a note unless it begins with "_", as private ones of libraries do.)
IGNORED = {
    "expand", "rope_theta", "partial_rotary_factor", "attention_dropout", "hidden_dropout",
    "initializer_range", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual",
    "residual_in_fp32", "num_logits_to_keep", "use_mamba_kernels", "use_cache", "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap", "output_router_logits", "auto_map", "architectures",
    "transformers_version", "model_type", "rope_scaling", "rope_parameters", "quantization_config",
    "compression_config", "attn_implementation", "mtp_use_repeated_layer", "router_aux_loss_coef",
    "moe_aux_loss_coeff", "moe_router_load_balancing_type", "unsloth_version", "unsloth_fixed",
    # of a narrower prediction head, which mtp_bottleneck_* asks for
    "mtp_scale_shared_expert_with_bottleneck", "mtp_dense_mlp_match_moe_active_params",
    # of every configuration that transformers writes, without a meaning for this family
    "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type", "torchscript", "pruned_heads",
    "use_bfloat16", "add_cross_attention", "tie_encoder_decoder", "cross_attention_hidden_size",
    "decoder_start_token_id", "sep_token_id", "prefix", "tokenizer_class", "finetuning_task",
    "task_specific_params", "tf_legacy_loss", "max_length", "min_length", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip
# REFUSED: known to change what a model computes, and not supported; with the values that change nothing.
# A star stands for any ending; a key of the prediction head changes nothing where there is none.
OFF: tuple = (False, 0, "", [], {})
REFUSED: dict[str, tuple] = {
    "mtp_use_rope": OFF, "mtp_bottleneck_*": OFF, "mtp_naive_parallel_*": OFF, "mtp_block_configs": OFF,
    "mtp_window_size": OFF, "mtp_softmax_type": ("vanilla",), "mtp_use_bottleneck_lm_head": OFF,
    "block_configs": OFF,                # widths of their own in every layer
    # attention
    "use_rope": OFF, "position_embedding_type": ("none", "nope"), "qk_norm": OFF, "use_qk_norm": OFF,
    "qk_layernorm": OFF, "qk_l2_norm": OFF, "softmax_type": ("vanilla",), "window_size": OFF,
    "attention_chunk_size": OFF, "attn_logit_softcapping": OFF, "qkv_bias": OFF, "add_qkv_bias": OFF,
    "add_bias_linear": OFF, "attention_multiplier": (),
    # norms and the Mamba mixer
    "normalization": ("RMSNorm",), "apply_layernorm_1p": OFF, "layernorm_zero_centered_gamma": OFF,
    "norm_before_gate": OFF, "mamba_norm_before_gate": OFF, "mamba_rms_norm": (True,), "D_has_hdim": OFF,
    "parallel_residual": OFF, "use_parallel_residual": OFF,
    # experts and MLP
    "scoring_func": ("sigmoid",), "moe_router_score_function": ("sigmoid",), "topk_method": ("noaux_tc",),
    "moe_router_pre_softmax": OFF, "moe_apply_probs_on_input": OFF, "apply_router_weight_on_input": OFF,
    "moe_shared_expert_gate": OFF, "zero_expert_num": OFF, "gated_linear_unit": OFF, "swiglu_limit": OFF,
    "activation_func_clamp_value": OFF,
    # factors and caps on the stream, the logits, and what a mixer reads and adds
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,), "logit_scale": (1,),
    "lm_head_multiplier": (1,), "key_multiplier": (1,), "ssm_in_multiplier": (1,), "ssm_out_multiplier": (1,),
    "attention_in_multiplier": (1,), "attention_out_multiplier": (1,), "ssm_multipliers": (),
    "mlp_multipliers": (), "final_logit_softcapping": OFF,
}  # fmt: skip
# ALIASES: other names, at the left. Where both are present the one at the left wins, as in transformers.
ALIASES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor", "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias", "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts", "torch_dtype": "dtype",
}  # fmt: skip
# SYNONYMS: names of other exporters. Where two are present they must agree: no rule says which one counts.
SYNONYMS = {
    "norm_eps": "layer_norm_epsilon", "rms_norm_eps": "layer_norm_epsilon",
    "layernorm_epsilon": "layer_norm_epsilon",
    "attention_head_dim": "head_dim", "kv_channels": "head_dim", "num_query_groups": "num_key_value_heads",
    "mamba_n_heads": "mamba_num_heads", "mamba_d_head": "mamba_head_dim", "mamba_d_state": "ssm_state_size",
    "mamba_state_dim": "ssm_state_size", "mamba_num_groups": "n_groups",
    "ffn_hidden_size": "intermediate_size", "num_experts": "n_routed_experts",
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok", "moe_ffn_hidden_size": "moe_intermediate_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_router_topk_scaling_factor": "routed_scaling_factor", "mtp_num_layers": "num_nextn_predict_layers",
}  # fmt: skip


TABLES = (REQUIRED, OPTIONAL, FIXED, SPELLINGS, DERIVED, IGNORED)

# TEXT_MODEL: where wrappers with images or sound keep the configuration of their text model, the newer first;
# INHERITED: what they may give for the whole.
TEXT_MODEL = ("text_config", "llm_config")
INHERITED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
ARCHITECTURE = "NemotronHForCausalLM"


def read(hf: dict, notes: list[str]) -> dict[str, Any]:
    """Return the fields of a Config from a parsed `config.json`; InputError names the key that is wrong.

    `notes` gets a sentence on each thing that a user should know and that is no error.
    """
    if not isinstance(hf, dict):
        raise InputError("config.json is not a JSON object")
    hf = text_model(hf, notes)
    model_type = hf.get("model_type")
    if model_type != "nemotron_h":
        hint = " (per-layer widths are not supported)" if model_type == "nemotron_h_puzzle" else ""
        raise InputError(f"model_type {shown(model_type)} is not supported{hint}: refengine runs nemotron_h")
    hf = _renamed(hf)
    for key, only in FIXED.items():
        if hf.get(key, only) != only:
            raise InputError(f"{key} = {shown(hf[key])} is not supported: nemotron_h has {only!r}")
    _refuse(hf)
    if unknown := [key for key in hf if not _is_known(key)]:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        names = ", ".join(map(shown, unknown[:8]))
        notes.append(f"config.json has keys that refengine does not know: {names}{more}; they are ignored")
    layers = _letters(hf, ("layers_block_type", "layer_types"), "hybrid_override_pattern")
    if not layers:
        raise InputError("config.json has neither layers_block_type nor hybrid_override_pattern")
    heads = hf.get("num_nextn_predict_layers", 0)
    if type(heads) is not int or not 0 <= heads < 2**31:
        raise InputError(f"num_nextn_predict_layers = {shown(heads)} is not a number of prediction heads")
    if heads > 1:  # exporters count steps of one head that is applied repeatedly (Megatron trains it so)
        notes.append(f"num_nextn_predict_layers = {heads}: only the first prediction head is used")
    mtp = (_letters(hf, ("mtp_layers_block_type",), "mtp_hybrid_override_pattern") or "*E") if heads else ""
    if "*" in layers + mtp and "head_dim" not in hf:
        hf["head_dim"] = _head_dim(hf)
    for key, letters in REQUIRED.items():
        if hf.get(key) is None and set(letters) & set(layers + mtp):
            needing = "the model" if letters == KINDS else f"its {NAME_OF[letters]} layers"
            raise InputError(f"config.json lacks {key}, which is required for {needing}")
    out: dict[str, Any] = {"layers": layers, "mtp_layers": mtp}
    out |= {key: hf[key] for key, letters in REQUIRED.items() if set(letters) & set(layers + mtp)}
    out |= {key: hf.get(key, meaning) for key, meaning in OPTIONAL.items()}
    out["time_step_limit"] = tuple(_number(v) for v in _listed(out["time_step_limit"]))
    out["eos_token_id"] = tuple(_listed(out["eos_token_id"]))
    return out


def text_model(hf: dict, notes: list[str]) -> dict[str, Any]:
    """Return the configuration of the text model, which wrappers with images or sound have under a key."""
    if hf.get("model_type") == "nemotron_h":
        return hf
    for key in TEXT_MODEL:
        part = hf.get(key)
        if isinstance(part, dict):
            aside = [other for other in hf if other.endswith("_config") and other not in TEXT_MODEL]
            what = f" beside {', '.join(map(shown, sorted(aside)))}" if aside else ""
            notes.append(f"config.json has {key}{what}: only the text model is loaded")
            named = part.get("architectures")
            if part.get("model_type") is None and isinstance(named, list) and ARCHITECTURE in named:
                part = part | {"model_type": "nemotron_h"}
            return {other: hf[other] for other in INHERITED if other in hf} | part
    return hf


def names_of(key: str) -> list[str]:
    """Return all names of a key: its own first."""
    return [key, *(other for other, name in (SYNONYMS | ALIASES).items() if name == key)]


def _renamed(hf: dict) -> dict[str, Any]:
    """Return the keys under the names of the tables; null counts as absent, except for key/value heads."""
    first: dict[str, str] = {}
    for other, key in [(key, key) for key in SYNONYMS.values()] + list(SYNONYMS.items()):
        if hf.get(other) is not None and hf[other] != hf[first.setdefault(key, other)]:
            what = f"{first[key]} = {shown(hf[first[key]])} and {other} = {shown(hf[other])}"
            raise InputError(f"config.json gives {key} two values: {what}")
    names = SYNONYMS | ALIASES
    if "num_key_value_heads" in hf and hf["num_key_value_heads"] is None:  # every query head has its own
        hf = hf | {"num_key_value_heads": hf.get("num_attention_heads")}
    hf = hf | {key: hf[other] for other, key in names.items() if hf.get(other) is not None}
    return {key: value for key, value in hf.items() if value is not None and key not in names}


def _is_known(key: str) -> bool:
    """Return whether a key is in a table, or is a private one of a library."""
    return key.startswith("_") or any(key in table for table in TABLES) or _refusal(key) is not None


def _refusal(key: str) -> str | None:
    """Return the entry of REFUSED that covers a key."""
    if key in REFUSED:
        return key
    return next((name for name in REFUSED if name[-1] == "*" and key.startswith(name[:-1])), None)


def _refuse(hf: dict) -> None:
    """Refuse keys that would change the results, unless their values are neutral."""
    for key, value in hf.items():
        if (name := _refusal(key)) is None or value in REFUSED[name]:
            continue
        if key.startswith("mtp_") and not hf.get("num_nextn_predict_layers"):
            continue
        raise InputError(f"{key} = {shown(value)} is not supported: it would change what the model computes")


def _head_dim(hf: dict) -> int | None:
    """Return hidden_size / num_attention_heads, the meaning of an absent head_dim; None if one is absent."""
    hidden, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
    for key, size in {"hidden_size": hidden, "num_attention_heads": heads}.items():
        if size is not None and (type(size) is not int or size <= 0):
            raise InputError(f"config.json: {key} = {shown(size)} is not a positive integer")
    if hidden is None or heads is None:
        return None
    if hidden % heads:
        what = f"hidden_size = {shown(hidden)} is no multiple of num_attention_heads = {shown(heads)}"
        raise InputError(f"config.json lacks head_dim, and {what}")
    return hidden // heads


def _letters(hf: dict, list_keys: tuple[str, ...], pattern_key: str) -> str:
    """Return the letters of the layers, from the first of the lists that is there, else from the pattern."""
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


def _listed(value: Any) -> list | tuple:
    """Return a list as it is, and any other value in a list of its own."""
    return value if isinstance(value, (list, tuple)) else [value]


def _number(value: Any) -> float:
    """Return a number. JSON cannot write infinity: it is a float, a string, or {"__float__": "Infinity"}."""
    try:
        return float(value["__float__"] if isinstance(value, dict) else value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise InputError(f"time_step_limit holds {shown(value)}, which is not a number") from None

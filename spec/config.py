"""Chapter 1. The configuration: every size in the model has one name, and it comes from `config.json`.

A `Config` is read once, at the door, by `Config.from_hf`; nothing later asks how a release spelled a key.
The layer list becomes a string with one letter a layer:

    M  Mamba-2        *  attention        E  experts (MoE)        -  dense MLP

Nemotron 3 Nano begins `MEMEM*EMEMEM*E`. Sizes are never guessed: a key that a layer needs and the file lacks
is an error. Facts and sources: docs/model.md, "Configuration".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from reprlib import repr as shown  # a value of config.json in a sentence: short, whatever it is
from types import SimpleNamespace

KINDS = "M*E-"
LETTER_OF = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E",
             "mlp": "-"}  # fmt: skip
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
# DERIVED from other keys, even when present and stale.
DERIVED = {"num_hidden_layers", "layers_block_type", "layer_types", "hybrid_override_pattern",
           "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern"}  # fmt: skip
# IGNORED: for training, initialisation, or another program; they do not change what the model computes.
IGNORED = {
    "expand", "rope_theta", "partial_rotary_factor", "attention_dropout", "hidden_dropout",
    "initializer_range", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual",
    "residual_in_fp32", "num_logits_to_keep", "use_mamba_kernels", "use_cache", "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap", "output_router_logits", "auto_map", "architectures",
    "transformers_version", "model_type",
}  # fmt: skip
# Older spellings; where both are present the older one wins, as it does in transformers.
ALIASES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor", "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias", "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts", "norm_eps": "layer_norm_epsilon", "torch_dtype": "dtype",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields are named as in `config.json`; sizes of layer kinds that the model does not have are 0."""

    layers: str
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    ssm_state_size: int = 0
    n_groups: int = 0
    conv_kernel: int = 0
    chunk_size: int = 0
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    intermediate_size: int = 0
    mtp_layers: str = ""  # the letters of the multi-token prediction head, "" without one
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "bfloat16"

    # Trap 4: the inner width is heads x head_dim, never expand x hidden_size.
    @property
    def mamba_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x | B | C."""
        return sum(self.conv_widths)

    @property
    def conv_widths(self) -> tuple[int, int, int]:
        """Channels of x, B and C."""
        return self.mamba_inner, self.n_groups * self.ssm_state_size, self.n_groups * self.ssm_state_size

    @property
    def in_proj_widths(self) -> tuple[int, int, int]:
        """Rows of `in_proj`, in order: z | xBC | dt."""
        return self.mamba_inner, self.conv_dim, self.mamba_num_heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        kv = self.num_key_value_heads * self.head_dim
        return self.num_attention_heads * self.head_dim, kv, kv

    @property
    def expert_width(self) -> int:
        """Width the routed experts read and write: the latent, or the hidden size without one."""
        return self.moe_latent_size or self.hidden_size

    @classmethod
    def from_hf(cls, hf: dict) -> Config:
        """Read a parsed `config.json`; InputError names the key that is missing or cannot hold."""
        values = _fields_from(hf)
        _check(SimpleNamespace(**{f.name: f.default for f in fields(cls)} | values))
        return cls(**{key: float(v) if key in REAL else v for key, v in values.items()})

    def to_hf(self) -> dict:
        """The same configuration as a `config.json` that transformers reads too."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        letters, mtp = out.pop("layers"), out.pop("mtp_layers")
        out = {k: v for k, v in out.items() if set(REQUIRED.get(k, KINDS)) & set(letters + mtp)}
        out |= {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"],
                "num_hidden_layers": len(letters), "hybrid_override_pattern": letters,
                "layers_block_type": [NAME_OF[k] for k in letters],
                "num_nextn_predict_layers": 1 if mtp else 0,
                "eos_token_id": list(self.eos_token_id)}  # fmt: skip
        if mtp:
            out |= {"mtp_hybrid_override_pattern": mtp, "mtp_layers_block_type": [NAME_OF[k] for k in mtp]}
        return out | FIXED


def _fields_from(hf: dict) -> dict:
    if not isinstance(hf, dict):
        raise InputError("config.json does not hold a JSON object")
    model_type = hf.get("model_type")
    if model_type != "nemotron_h":
        hint = " (per-layer widths are not supported)" if model_type == "nemotron_h_puzzle" else ""
        raise InputError(f"model_type {shown(model_type)} is not supported{hint}: refengine runs nemotron_h")
    if None is not hf.get("norm_eps") != hf.get("layer_norm_epsilon", hf.get("norm_eps")):
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


def _check(c: SimpleNamespace) -> None:
    """Values that cannot all hold are refused by name, before there is a Config."""

    def need(holds, sentence: str):
        if not holds:
            raise InputError(f"config.json: {sentence}")

    def whole(value) -> bool:
        return type(value) is int and 0 < value < 2**31

    count = len(c.layers + c.mtp_layers)
    need(count <= 4096, f"{count} layers are more than the 4096 this program accepts")
    kinds = set(c.layers + c.mtp_layers)
    for key, letters in REQUIRED.items():
        value = getattr(c, key)
        if not set(letters) & kinds:
            continue
        if key in REAL:
            need(_is_number(value) and value > 0, f"{key} = {shown(value)} is not a positive number")
        else:
            need(whole(value), f"{key} = {shown(value)} is not a positive integer")
    for key in ("n_group", "topk_group", "moe_latent_size"):
        value = getattr(c, key)
        need(value is None or whole(value), f"{key} = {shown(value)} is not a positive integer")
    for key in ("norm_topk_prob", "tie_word_embeddings"):
        need(isinstance(getattr(c, key), bool), f"{key} = {shown(getattr(c, key))} is neither true nor false")
    for key, ids in (("bos_token_id", (c.bos_token_id,)), ("pad_token_id", (c.pad_token_id,)),
                     ("eos_token_id", c.eos_token_id)):  # fmt: skip
        for value in ids:
            need(value is None or type(value) is int, f"{key} = {shown(value)} is not a token id")
    limit = c.time_step_limit
    need(len(limit) == 2 and limit[0] <= limit[1], f"time_step_limit = {shown(limit)} is not [low, high]")
    need(isinstance(c.dtype, str), f"dtype = {shown(c.dtype)} is not the name of a dtype")
    H, G, A, KV = c.mamba_num_heads, c.n_groups, c.num_attention_heads, c.num_key_value_heads
    E, k, groups = c.n_routed_experts, c.num_experts_per_tok, c.n_group
    if "M" in kinds:
        need(H % G == 0, f"mamba_num_heads = {H} is not a multiple of n_groups = {G}")
    if "*" in kinds:
        need(A % KV == 0, f"num_attention_heads = {A} is not a multiple of num_key_value_heads = {KV}")
    if "E" in kinds:
        need(E <= 65536, f"n_routed_experts = {E} is more than 65536")
        need(E % groups == 0, f"n_routed_experts = {E} is not a multiple of n_group = {groups}")
        need(c.topk_group <= groups, f"topk_group = {c.topk_group} is more than n_group = {groups}")
        need(groups == 1 or E // groups >= 2, f"n_group = {groups} leaves fewer than two experts a group")
        open_to = c.topk_group * E // groups
        need(k <= open_to, f"num_experts_per_tok = {k} is more than the {open_to} experts it chooses from")


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e38  # what float32 can hold, and no NaN

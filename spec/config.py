"""Chapter 2. The configuration: every size in the model has one name, the one it has in `config.json`.

A `Config` is made once, when a checkpoint is opened, and is never changed. The conditions between sizes
are checked before it is made, so no later chapter checks them. Facts and sources: docs/model.md,
"Configuration".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from types import SimpleNamespace

from refengine.spec.keys import (
    ARCHITECTURE,
    FIXED,
    KINDS,
    NAME_OF,
    REAL,
    REQUIRED,
    InputError,
    first_line,
    read,
    shown,
)

__all__ = ["NAME_OF", "Config", "InputError", "first_line"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Holds the fields of `config.json` under their names; sizes of absent kinds of layers are 0."""

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
        """Return the width inside a Mamba mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Return the number of channels of the causal convolution: x | B | C."""
        return sum(self.conv_widths)

    @property
    def conv_widths(self) -> tuple[int, int, int]:
        """Return the numbers of channels of x, B and C (chapter 8)."""
        return self.mamba_inner, self.n_groups * self.ssm_state_size, self.n_groups * self.ssm_state_size

    @property
    def in_proj_widths(self) -> tuple[int, int, int]:
        """Return the numbers of rows of `in_proj`, in order: z | xBC | dt."""
        return self.mamba_inner, self.conv_dim, self.mamba_num_heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Return the numbers of rows of `q_proj`, `k_proj` and `v_proj`."""
        kv = self.num_key_value_heads * self.head_dim
        return self.num_attention_heads * self.head_dim, kv, kv

    @property
    def expert_width(self) -> int:
        """Return the width that routed experts read and write: the latent, or the hidden size without one."""
        return self.moe_latent_size or self.hidden_size

    @classmethod
    def from_hf(cls, hf: dict, notes: list[str] | None = None) -> Config:
        """Return the Config of a parsed `config.json`; InputError names the key that is missing or wrong.

        `notes`, if given, gets a sentence on each thing that a user should know and that is no error.
        """
        values = read(hf, [] if notes is None else notes)
        _check(SimpleNamespace(**{f.name: f.default for f in fields(cls)} | values))
        return cls(**values | {key: float(values[key]) for key in REAL if key in values})

    def to_hf(self) -> dict:
        """Return the same configuration as a `config.json` that transformers reads too."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        letters, mtp = out.pop("layers"), out.pop("mtp_layers")
        out = {k: v for k, v in out.items() if set(REQUIRED.get(k, KINDS)) & set(letters + mtp)}
        if self.time_step_limit == (0.0, math.inf):  # an absent key has this meaning
            del out["time_step_limit"]
        elif self.time_step_limit[1] == math.inf:  # JSON has no infinity: as transformers writes it
            out["time_step_limit"] = (self.time_step_limit[0], {"__float__": "Infinity"})
        out |= {
            "model_type": "nemotron_h",
            "architectures": [ARCHITECTURE],
            "num_hidden_layers": len(letters),
            "hybrid_override_pattern": letters,
            "layers_block_type": [NAME_OF[k] for k in letters],
            "num_nextn_predict_layers": 1 if mtp else 0,
            "eos_token_id": list(self.eos_token_id),
        }
        if mtp:
            out |= {"mtp_hybrid_override_pattern": mtp, "mtp_layers_block_type": [NAME_OF[k] for k in mtp]}
        return out | FIXED


def _check(c: SimpleNamespace) -> None:
    """Refuse values that cannot all hold, by name, before there is a Config."""
    count = len(c.layers + c.mtp_layers)
    _need(count <= 4096, f"{count} layers are more than the 4096 this program accepts")
    kinds = set(c.layers + c.mtp_layers)
    for key, letters in REQUIRED.items():
        value = getattr(c, key)
        if not set(letters) & kinds:
            continue
        if key in REAL:
            _need(_is_number(value) and value > 0, f"{key} = {shown(value)} is not a positive number")
        else:
            _need(_is_whole(value), f"{key} = {shown(value)} is not a positive integer")
    for key in ("n_group", "topk_group", "moe_latent_size"):
        value = getattr(c, key)
        _need(value is None or _is_whole(value), f"{key} = {shown(value)} is not a positive integer")
    for key in ("norm_topk_prob", "tie_word_embeddings"):
        value = getattr(c, key)
        _need(isinstance(value, bool), f"{key} = {shown(value)} is neither true nor false")
    for key in ("bos_token_id", "pad_token_id"):
        value = getattr(c, key)
        _need(value is None or type(value) is int, f"{key} = {shown(value)} is not a token id")
    for value in c.eos_token_id:
        _need(type(value) is int, f"eos_token_id holds {shown(value)}, which is not a token id")
    limit = c.time_step_limit
    _need(len(limit) == 2 and limit[0] <= limit[1], f"time_step_limit = {shown(limit)} is not [low, high]")
    _need(isinstance(c.dtype, str), f"dtype = {shown(c.dtype)} is not the name of a dtype")
    H, G, A, KV = c.mamba_num_heads, c.n_groups, c.num_attention_heads, c.num_key_value_heads
    E, k, groups = c.n_routed_experts, c.num_experts_per_tok, c.n_group
    if "M" in kinds:
        _need(H % G == 0, f"mamba_num_heads = {H} is not a multiple of n_groups = {G}")
    if "*" in kinds:
        _need(A % KV == 0, f"num_attention_heads = {A} is not a multiple of num_key_value_heads = {KV}")
    if "E" in kinds:
        _need(E <= 65536, f"n_routed_experts = {E} is more than 65536")
        _need(E % groups == 0, f"n_routed_experts = {E} is not a multiple of n_group = {groups}")
        _need(c.topk_group <= groups, f"topk_group = {c.topk_group} is more than n_group = {groups}")
        _need(groups == 1 or E // groups >= 2, f"n_group = {groups} leaves fewer than two experts a group")
        open_to = c.topk_group * E // groups
        _need(k <= open_to, f"num_experts_per_tok = {k} is more than the {open_to} experts it chooses from")


def _need(holds, sentence: str) -> None:
    if not holds:
        raise InputError(f"config.json: {sentence}")


def _is_whole(value) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e38  # what float32 can hold, and no NaN

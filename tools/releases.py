"""The configurations of the released models, as they were published (docs/model.md, "Configuration")."""

from refengine.spec.config import Config

# Nemotron 3 Nano 30B-A3B, every key of its config.json.
NANO = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hidden_size": 2688,
    "num_hidden_layers": 52, "vocab_size": 131072, "tie_word_embeddings": False, "num_attention_heads": 32,
    "num_key_value_heads": 2, "head_dim": 128, "attention_bias": False, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "mamba_num_heads": 64, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4, "chunk_size": 128, "expand": 2, "mamba_hidden_act": "silu", "use_conv_bias": True,
    "mamba_proj_bias": False, "use_bias": False, "mamba_ssm_cache_dtype": "float32",
    "residual_in_fp32": False,
    "n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 3712, "moe_intermediate_size": 1856, "intermediate_size": 1856,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "mlp_hidden_act": "relu2", "mlp_bias": False, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5,
    "initializer_range": 0.02,
    "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4, "rope_theta": 10000,
    "partial_rotary_factor": 1.0, "sliding_window": None, "max_position_embeddings": 262144,
    "num_logits_to_keep": 1, "rescale_prenorm_residual": True, "use_mamba_kernels": True, "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}, "transformers_version": "4.53.2",
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
}  # fmt: skip
SUPER = NANO | {
    "hidden_size": 4096, "mamba_num_heads": 128, "n_routed_experts": 512, "num_experts_per_tok": 22,
    "moe_intermediate_size": 2688, "intermediate_size": 2688, "moe_shared_expert_intermediate_size": 5376,
    "moe_latent_size": 1024, "routed_scaling_factor": 5.0, "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E", "num_hidden_layers": 88,
    "hybrid_override_pattern":
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
}  # fmt: skip
NAMES = {"M": "mamba", "E": "moe", "*": "attention"}
ULTRA_LAYERS = "MEMEME" + 4 * ("M*E" + 2 * "ME" + "M*E" + 3 * "ME" + "M*E" + 3 * "ME") + "ME"


def listed(config: dict, layers: str) -> dict:
    """Return a configuration with the newer spelling of the layers: lists, and no pattern."""
    patterns = ("hybrid_override_pattern", "mtp_hybrid_override_pattern", "num_hidden_layers")
    return {key: value for key, value in config.items() if key not in patterns} | {
        "layers_block_type": [NAMES[kind] for kind in layers],
        "num_nextn_predict_layers": 1,
        "mtp_layers_block_type": ["attention", "moe"],
    }


ULTRA = listed(SUPER, ULTRA_LAYERS) | {
    "hidden_size": 8192, "num_attention_heads": 64, "mamba_num_heads": 256, "moe_intermediate_size": 5120,
    "intermediate_size": 5120, "moe_shared_expert_intermediate_size": 10240, "moe_latent_size": 2048,
}  # fmt: skip
LIGHTNING = listed(NANO, NANO["hybrid_override_pattern"]) | {
    "moe_latent_size": None, "max_position_embeddings": 1048576,
}  # fmt: skip
FILES = {"nano": NANO, "super": SUPER, "ultra": ULTRA, "lightning": LIGHTNING}
CONFIGS = {name: Config.from_hf(file) for name, file in FILES.items()}


def dense(layers, hidden, heads, head_dim, state, ffn, q, chunk=128) -> Config:
    """Return a hybrid with plain MLP layers and no experts."""
    own = {key: value for key, value in NANO.items() if "expert" not in key and "moe" not in key}
    return Config.from_hf(
        own
        | {
            "hybrid_override_pattern": layers,
            "hidden_size": hidden,
            "mamba_num_heads": heads,
            "mamba_head_dim": head_dim,
            "ssm_state_size": state,
            "intermediate_size": ffn,
            "num_attention_heads": q,
            "num_key_value_heads": 8,
            "chunk_size": chunk,
        }
    )


H4_8 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
H47 = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
H56 = (
    "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*"
    "-M-M-M-M-M*-M-M-M-M-M-"
)
V2_9 = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
V2_12 = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
N3_4 = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
# name: configuration, parameters, tensors
DENSE = {
    "Nemotron-H 4B": (dense(H4_8, 3072, 112, 64, 128, 12288, 32), 4_489_223_040, 311),
    "Nemotron-H 8B": (dense(H4_8, 4096, 128, 64, 128, 21504, 32), 8_100_852_736, 311),
    "Nemotron-H 47B": (dense(H47, 8192, 256, 64, 256, 30720, 64), 46_791_554_816, 577),
    "Nemotron-H 56B": (dense(H56, 8192, 256, 64, 256, 32768, 64), 56_324_350_464, 701),
    "Nano-9B-v2": (dense(V2_9, 4480, 128, 80, 128, 15680, 40), 8_888_227_328, 341),
    "Nano-12B-v2": (dense(V2_12, 5120, 128, 80, 128, 20480, 40), 12_310_001_152, 369),
    "Nemotron-3 Nano 4B": (dense(N3_4, 3136, 96, 80, 128, 12544, 40, chunk=256), 3_973_556_832, 263),
}

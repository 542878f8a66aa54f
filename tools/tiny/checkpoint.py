"""Write and read the embedded model as files: its configuration and its exported weights."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from . import tokenizer as tiny_tokenizer
from .model import TinyModel, export_state, import_state

PACKAGED = Path(__file__).resolve().parents[2] / "refengine" / "models" / "tiny"  # has the chat template too
PATTERN, MTP_PATTERN = "M*MEM*EME", "*E"
KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 2048,
    "hidden_size": 192,
    "num_hidden_layers": len(PATTERN),
    "hybrid_override_pattern": PATTERN,
    "layers_block_type": [KINDS[c] for c in PATTERN],
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": MTP_PATTERN,
    "tie_word_embeddings": False,
    "residual_in_fp32": False,
    "hidden_dropout": 0.0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "sliding_window": None,
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
    "max_position_embeddings": 16384,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 32,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
    "expand": 2,
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "use_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "rescale_prenorm_residual": True,
    "use_mamba_kernels": False,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "intermediate_size": 128,
    "moe_latent_size": 64,
    "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 192,
    "moe_shared_expert_overlap": False,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "initializer_range": 0.02,
    "num_logits_to_keep": 1,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}


def write_checkpoint(directory, model, tokenizer, record):
    """Write all files of the package but the card: configs, tokenizer, template, weights, training.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer.save(tokenizer, directory)
    if directory.resolve() != PACKAGED.resolve():
        (directory / "chat_template.jinja").write_text((PACKAGED / "chat_template.jinja").read_text())
    (directory / "config.json").write_text(json.dumps(model.cfg, indent=2) + "\n")
    save_file(export_state(model), directory / "model.safetensors.part", metadata={"format": "pt"})
    (directory / "model.safetensors.part").chmod(0o644)
    (directory / "model.safetensors.part").rename(directory / "model.safetensors")
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def read_checkpoint(directory):
    """Return a TinyModel with exported weights."""
    directory = Path(directory)
    model = TinyModel(json.loads((directory / "config.json").read_text()))
    import_state(model, load_file(directory / "model.safetensors"))
    return model

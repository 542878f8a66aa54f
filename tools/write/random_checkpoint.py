"""Write a checkpoint with random weights that behave like trained ones, to measure speed with.

    python -m tools.write.random_checkpoint mid DIRECTORY          2.24 B weights, 4.5 GB, like a small Nano
    python -m tools.write.random_checkpoint CONFIG.json DIRECTORY  any configuration

The same seed gives the same bytes on every machine of the same NumPy.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import write
from refengine.spec.config import Config

MID = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEMEM*EMEMEM*E",
    "hidden_size": 1344,
    "vocab_size": 32768,
    "max_position_embeddings": 131072,
    "layer_norm_epsilon": 1e-5,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "chunk_size": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 960,
    "moe_shared_expert_intermediate_size": 1920,
    "routed_scaling_factor": 2.5,
}


@click.command(help=__doc__.splitlines()[0])
@click.argument("config")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(config: str, directory: Path, seed: int):
    cfg = Config.from_hf(MID if config == "mid" else json.loads(Path(config).read_text()))
    write(directory, cfg, random_values(cfg, seed))


if __name__ == "__main__":
    main()

"""The anatomy of a checkpoint: layers, sizes, tensors and bytes by role, and the memory of a sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.packed import KINDS, AnyStored, Unread
from refengine.spec.arrays import DTYPES, ITEMSIZE
from refengine.spec.config import NAME_OF, Config
from refengine.spec.tensors import Tensor, active_parameters, parameters, table


def anatomy(checkpoint: Checkpoint) -> dict:
    """Return what a checkpoint is made of, ready for JSON: sizes, counts and bytes by role, state, notes."""
    cfg, rows = checkpoint.config, table(checkpoint.config)
    roles = counted(checkpoint, lambda row: f"mtp {row.role}" if row.block.startswith("mtp.") else row.role)
    blocks = counted(checkpoint, lambda row: row.block or row.role)
    kinds = {f"layers.{i}": kind for i, kind in enumerate(cfg.layers)}
    kinds |= {f"mtp.layers.{i}": kind for i, kind in enumerate(cfg.mtp_layers)}
    head = parameters(row for row in rows if row.block.startswith("mtp."))
    outer = cfg.vocab_size * cfg.hidden_size  # whether or not the embedding serves as lm_head
    return {
        "path": str(checkpoint.directory),
        "pattern": cfg.layers,
        "mtp_pattern": cfg.mtp_layers,
        "layers": {NAME_OF[kind]: count for kind, count in Counter(cfg.layers).items()},
        "config": cfg.to_hf(),
        "tensors": len(rows),
        "parameters": parameters(rows),
        "parameters_without_head": parameters(rows) - head,
        "active_parameters": active_parameters(cfg),
        "active_parameters_with_lm_head": active_parameters(cfg) + outer,
        "bytes": sum(part["bytes"] for part in roles.values()),
        "bytes_of_a_token": bytes_of_a_token(checkpoint),
        "dtypes": dict(Counter(checkpoint.stored[row.name].dtype for row in rows)),
        "roles": roles,
        "blocks": {
            block: {"kind": NAME_OF.get(kinds.get(block, ""))} | part for block, part in blocks.items()
        },
        "state": state_bytes(cfg),
        "notes": list(checkpoint.notes),
    }


def counted(checkpoint: Checkpoint, key: Callable[[Tensor], str]) -> dict[str, dict]:
    """Return tensors, parameters, bytes and dtypes in sum by the key of each tensor, in their order."""
    parts: dict[str, dict] = {}
    for row in table(checkpoint.config):
        empty = {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": Counter()}
        part = parts.setdefault(key(row), empty)
        part["dtypes"][checkpoint.stored[row.name].dtype] += 1
        part["tensors"] += 1
        part["parameters"] += row.size
        part["bytes"] += checkpoint.bytes_of(row)
    return parts


def bytes_of_a_token(checkpoint: Checkpoint) -> int:
    """Return the bytes of weights that one token reads, decoded alone: its experts, one row of the embedding.

    Without the prediction head.
    """
    cfg, total = checkpoint.config, 0.0
    for row in table(cfg):
        if row.block.startswith("mtp."):
            continue
        share = 1.0
        if row.role == "routed_expert":
            share = cfg.num_experts_per_tok / cfg.n_routed_experts
        if row.role == "embedding" and not cfg.tie_word_embeddings:
            share = 1 / cfg.vocab_size
        total += share * checkpoint.bytes_of(row)
    return round(total)


def placed_on(checkpoint: Checkpoint, backend: str) -> Checkpoint:
    """Return the checkpoint with the sizes that its weights have on a backend, by its name.

    Weights in a packed form that the backend does not multiply become bfloat16.
    """
    kept = {*DTYPES, *(KINDS if backend == "torch" else ())}
    if backend in ("numpy", "cpu"):
        return checkpoint
    stored: dict[str, AnyStored | Unread] = {
        name: at if at.dtype in kept else Unread(name, "BF16", at.shape, 2 * prod(at.shape))
        for name, at in checkpoint.stored.items()
    }
    return replace(checkpoint, stored=stored)


def room(checkpoint: Checkpoint, backend: str, state: dict, context: int) -> dict:
    """Return the bytes of the weights on a backend, of one sequence, and those that its last token reads.

    state: as `state_bytes` returns it. A token reads the weights of its experts and of all else once, S, and
    the keys and values before it; the prediction head is not counted among them.
    """
    placed = placed_on(checkpoint, backend)
    kv = context * state["kv_bytes_per_token"]
    return {
        "weights_bytes": sum(at.nbytes for at in placed.stored.values()),
        "context_bytes": state["ssm_bytes"] + state["conv_bytes"] + kv,
        "step_bytes": bytes_of_a_token(placed) + state["ssm_bytes"] + kv,
    }


def state_bytes(cfg: Config, dtype: str | None = None, kv: str | None = None, ssm: str | None = None) -> dict:
    """Return the bytes a sequence needs, fixed and per token.

    dtype: of the convolution's tail, by default the checkpoint's; kv: of keys and values, by default `dtype`;
    ssm: of S, by default float32.
    """
    dtype, ssm = dtype or cfg.dtype, ssm or "float32"
    kv, size = kv or dtype, ITEMSIZE | {"fp8": 1}
    mamba = cfg.layers.count("M")
    layer = 2 * cfg.num_key_value_heads * cfg.head_dim * size.get(kv, 2)
    return {
        "dtype": dtype,
        "kv_dtype": kv,
        "ssm_dtype": ssm,
        "ssm_bytes": mamba * cfg.mamba_inner * cfg.ssm_state_size * size[ssm],
        "conv_bytes": mamba * cfg.conv_dim * max(0, cfg.conv_kernel - 1) * size.get(dtype, 2),
        "kv_bytes_per_token": cfg.layers.count("*") * layer,
        "mtp_kv_bytes_per_token": cfg.mtp_layers.count("*") * layer,
    }

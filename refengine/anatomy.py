"""What a checkpoint is made of: layers, sizes, tensors and bytes by role, and what a sequence will cost in
memory."""

from __future__ import annotations

from collections import Counter

from refengine.checkpoint import Checkpoint
from refengine.spec.arrays import DTYPES
from refengine.spec.config import NAME_OF, Config
from refengine.spec.tensors import active_parameters, parameters, table
from refengine.units import bytes_text, count_text

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def anatomy(checkpoint: Checkpoint) -> dict:
    """The facts, for a program; `text` says them to a person."""
    cfg, rows = checkpoint.config, table(checkpoint.config)
    roles: dict[str, dict] = {}
    for row in rows:
        part = roles.setdefault(
            f"mtp {row.role}" if row.block.startswith("mtp.") else row.role,
            {"tensors": 0, "parameters": 0, "bytes": 0},
        )
        part["tensors"] += 1
        part["parameters"] += row.size
        part["bytes"] += checkpoint.bytes_of(row)
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
        "dtypes": dict(Counter(checkpoint.stored[row.name].dtype for row in rows)),
        "roles": roles,
        "state": state_bytes(cfg),
        "notes": list(checkpoint.notes),
    }


def state_bytes(cfg: Config, dtype: str | None = None) -> dict:
    """Bytes a sequence needs: a fixed part, and one per token. S is in float32, the rest in `dtype`."""
    size = ITEMSIZE.get(dtype or cfg.dtype, 2)
    mamba = cfg.layers.count("M")
    kv = 2 * cfg.num_key_value_heads * cfg.head_dim * size
    return {
        "dtype": dtype or cfg.dtype,
        "ssm_bytes": mamba * cfg.mamba_inner * cfg.ssm_state_size * DTYPES["F32"].itemsize,
        "conv_bytes": mamba * cfg.conv_dim * max(0, cfg.conv_kernel - 1) * size,
        "kv_bytes_per_token": cfg.layers.count("*") * kv,
        "mtp_kv_bytes_per_token": cfg.mtp_layers.count("*") * kv,
    }


def text(a: dict) -> str:
    """One screen."""
    c, s, head = a["config"], a["state"], a["mtp_pattern"]
    lines = [
        a["path"],
        f"pattern       {a['pattern']}" + (f"   prediction head {head}" if head else ""),
        f"layers        {len(a['pattern'])}: " + ", ".join(f"{n} {kind}" for kind, n in a["layers"].items()),
        f"sizes         hidden {c['hidden_size']}, vocabulary {c['vocab_size']}, "
        f"context {c['max_position_embeddings']}",
    ]
    if "mamba_num_heads" in c:
        lines += [
            f"mamba         {c['mamba_num_heads']} heads x {c['mamba_head_dim']}, "
            f"state {c['ssm_state_size']}, {c['n_groups']} groups, "
            f"convolution {c['conv_kernel']}, chunk {c['chunk_size']}"
        ]
    if "num_attention_heads" in c:
        lines += [
            f"attention     {c['num_attention_heads']} query heads, "
            f"{c['num_key_value_heads']} key/value heads x {c['head_dim']}, no positions"
        ]
    if "n_routed_experts" in c:
        latent = f", latent {c['moe_latent_size']}" if c["moe_latent_size"] else ""
        lines += [
            f"experts       {c['num_experts_per_tok']} of {c['n_routed_experts']}, "
            f"width {c['moe_intermediate_size']}{latent}, "
            f"shared {c['moe_shared_expert_intermediate_size']}"
        ]
    if "intermediate_size" in c:
        lines += [f"mlp           width {c['intermediate_size']}"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in a["dtypes"].items())
    lines += [
        f"parameters    {a['parameters']:,} ({count_text(a['parameters'])})"
        + (f", {a['parameters_without_head']:,} without the prediction head" if head else ""),
        f"active        {count_text(a['active_parameters'])} a token, "
        f"{count_text(a['active_parameters_with_lm_head'])} with the output layer",
        f"tensors       {a['tensors']:,} ({dtypes}), {bytes_text(a['bytes'])}",
        "",
        f"{'role':22}{'tensors':>9}{'parameters':>18}{'bytes':>12}{'share':>9}",
    ]
    for role, part in sorted(a["roles"].items(), key=lambda item: -item[1]["bytes"]):
        lines += [
            f"{role:22}{part['tensors']:9,}{part['parameters']:18,}{bytes_text(part['bytes']):>12}"
            f"{part['bytes'] / a['bytes']:9.1%}"
        ]
    fixed = s["ssm_bytes"] + s["conv_bytes"]
    lines += [
        "",
        f"a sequence    {bytes_text(fixed)} of state whatever its length "
        f"(S {bytes_text(s['ssm_bytes'])} in float32, "
        f"convolution {bytes_text(s['conv_bytes'])} in {s['dtype']})",
        f"a token       {bytes_text(s['kv_bytes_per_token'])} of keys and values in {s['dtype']}"
        + (f", and {bytes_text(s['mtp_kv_bytes_per_token'])} for the prediction head" if head else ""),
    ]
    return "\n".join(lines + [f"note          {note}" for note in a["notes"]])

"""Other engines on whole models, where they are installed: llama.cpp and mlx-lm, with the weights of a case.

llama.cpp reads a GGUF file that `write_gguf` makes, by the names of docs/names.md, and keeps its cache in
float32. With bfloat16 weights it rounds the inputs of each product to bfloat16 too. mlx-lm runs on the
processor and gets the tensors under their own names. Both are imported when they are called.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from refengine.checkpoint.gguf.names import theirs
from refengine.conformance.cases import Case
from refengine.spec.arrays import Array, widen
from refengine.spec.config import Config
from refengine.spec.tensors import table

Logits = Callable[[Case], np.ndarray | None]  # of the first sequence of a case, l v; None where it has none


def engines() -> Iterator[tuple[str, Logits]]:
    """Return the name and the function of each engine that is installed."""
    if find_spec("llama_cpp") and find_spec("gguf"):
        yield "llama.cpp float32", lambda case: of_llama_cpp(case, "F32")
        yield "llama.cpp bfloat16", lambda case: of_llama_cpp(case, "BF16")
    if find_spec("mlx_lm") and find_spec("mlx"):
        yield "mlx-lm float32", lambda case: of_mlx(case, "float32")
        yield "mlx-lm bfloat16", lambda case: of_mlx(case, "bfloat16")


def of_llama_cpp(case: Case, weights: str) -> np.ndarray:
    """Return llama.cpp's logits, with weights in F32 or BF16."""
    import llama_cpp

    ids = case.ids[0].tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.gguf"
        write_gguf(path, case.cfg, case.read, weights)
        how: dict[str, Any] = dict(n_ctx=len(ids), n_batch=len(ids), n_ubatch=len(ids), logits_all=True)
        how |= dict(type_k=0, type_v=0, flash_attn=False, n_gpu_layers=0, n_threads=1, n_threads_batch=1)
        engine = llama_cpp.Llama(str(path), verbose=False, **how)
        engine.eval(ids)
        logits = np.array(engine.scores[: len(ids)])
        engine.close()
    return logits


def write_gguf(path: Path, cfg: Config, read: Callable[[str], Array], weights: str = "F32") -> None:
    """Write a model without its prediction head as GGUF, with weights in F32 or BF16, and no tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(path, "nemotron_h_moe" if "E" in cfg.layers else "nemotron_h")
    describe(writer, cfg)
    kind = gguf.GGMLQuantizationType[weights]
    for name, value, small in gguf_tensors(cfg, read):
        if small or weights == "F32":
            writer.add_tensor(name, np.ascontiguousarray(value))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, cfg: Config) -> None:
    """Add the sizes of a model to a GGUF file."""
    feed = {"-": cfg.intermediate_size, "E": cfg.moe_intermediate_size}
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(len(cfg.layers))
    writer.add_feed_forward_length([feed.get(letter, 0) for letter in cfg.layers])
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv([cfg.num_key_value_heads if letter == "*" else 0 for letter in cfg.layers])
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_eps(cfg.layer_norm_epsilon)
    writer.add_layer_norm_rms_eps(cfg.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(cfg.conv_kernel)
    writer.add_ssm_inner_size(cfg.mamba_inner)
    writer.add_ssm_state_size(cfg.ssm_state_size)
    writer.add_ssm_time_step_rank(cfg.mamba_num_heads)
    writer.add_ssm_group_count(cfg.n_groups)
    if "E" in cfg.layers:
        writer.add_expert_count(cfg.n_routed_experts)
        writer.add_expert_used_count(cfg.num_experts_per_tok)
        writer.add_expert_feed_forward_length(cfg.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(cfg.moe_shared_expert_intermediate_size)
        writer.add_expert_shared_count(1)
        writer.add_expert_group_count(cfg.n_group)
        writer.add_expert_group_used_count(cfg.topk_group)
        writer.add_expert_weights_norm(cfg.norm_topk_prob)
        writer.add_expert_weights_scale(cfg.routed_scaling_factor)
        if cfg.moe_latent_size:
            writer.add_moe_latent_size(cfg.moe_latent_size)


def gguf_tensors(cfg: Config, read: Callable[[str], Array]) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Return each tensor by its name in GGUF, in float32, and whether it stays in float32 in every file."""
    stacks: dict[str, list[np.ndarray]] = {}
    trunk = len(cfg.layers)
    for row in table(cfg):
        value = widen(read(row.name), np.float32)
        if row.role == "routed_expert" and row.block.startswith("layers."):
            experts, _, matrix, _ = row.name.rsplit(".", 3)
            stacks.setdefault(stack := f"{experts}.{matrix}", []).append(value)
            if len(stacks[stack]) == cfg.n_routed_experts:
                yield theirs(stack, trunk), np.stack(stacks.pop(stack)), False
        elif not row.block.startswith("mtp."):
            yield theirs(row.name, trunk), shaped(row.key, value, cfg), row.precision == "small"


def shaped(key: str, value: np.ndarray, cfg: Config) -> np.ndarray:
    """Return a tensor of a layer as GGUF has it: A = -exp(A_log), and axes of other sizes."""
    match key:
        case "mixer.conv1d.weight":
            return value[:, 0]
        case "mixer.A_log":
            return -np.exp(value)[:, None]
        case "mixer.D":
            return value[:, None]
        case "mixer.norm.weight":
            return value.reshape(cfg.n_groups, -1)
    return value


def of_mlx(case: Case, dtype: str) -> np.ndarray | None:
    """Return mlx-lm's logits in a dtype; it keeps A_log and the router's bias in float32.

    None for experts in bfloat16: MLX multiplies by them on a processor in float32 only.
    """
    if "E" in case.layers and dtype != "float32":
        return None
    import mlx.core as mx
    from mlx_lm.models import nemotron_h

    mx.set_default_device(mx.cpu)
    none = dict(attention_bias=False, mamba_proj_bias=False, mlp_bias=False, use_bias=False)
    unused = dict(intermediate_size=1, use_conv_bias=True)
    model = nemotron_h.Model(nemotron_h.ModelArgs.from_dict(unused | case.cfg.to_hf() | none))
    rows = [row for row in table(case.cfg) if not row.block.startswith("mtp.")]
    tensors = {row.name: mx.array(widen(case.read(row.name), np.float32)) for row in rows}
    cast, kind = model.cast_predicate, getattr(mx, dtype)
    tensors = {name: a.astype(kind) if cast(name) else a for name, a in model.sanitize(tensors).items()}
    model.load_weights(list(tensors.items()))
    return np.array(model(mx.array(case.ids[:1])).astype(mx.float32))[0]

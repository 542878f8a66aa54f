"""Record what llama.cpp makes of two small models, in its types: tests/checkpoint/gguf/*.gguf.

    python -m tools.write.gguf_files OUT SOURCE BIN

SOURCE is llama.cpp's source, with convert_hf_to_gguf.py; BIN the folder of its llama-quantize. The converter
needs torch and transformers. It knows tokenizers by a hash, and not these: `converted` makes it take them
for tekken, whose cuts they have. It reads config.json through transformers, which gives some experts to a
model without: of such a model it is made to read the file. Models are made of a seed; tests make them again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import write
from refengine.spec.config import Config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "refengine" / "models" / "tiny"
SEED, VOCAB = 7, 64
MERGES = [  # of the recorded files, whatever those of the embedded model are
    pair.split() for pair in
    ("h e", "Ġ t", "Ġ a", "Ġt he", "Ġ s", "Ġ w", "h a", "e d", "Ġ b", "e r", "i n", "n d", "o n", "Ġ ha",
     "Ġ c", "Ġ f")
]  # fmt: skip
BASE = {
    "vocab_size": VOCAB, "max_position_embeddings": 512, "layer_norm_epsilon": 1e-5, "mamba_num_heads": 4,
    "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "conv_kernel": 4, "chunk_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1,
    "eos_token_id": [2, 11], "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "experts": BASE | {
        "hidden_size": 64, "hybrid_override_pattern": "M*E", "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E", "n_routed_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "moe_latent_size": 64,
        "routed_scaling_factor": 2.5,
    },
    "dense": BASE | {
        "hidden_size": 256, "hybrid_override_pattern": "M-*", "n_groups": 1,
        "ssm_state_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
OF_EXPERTS = ("n_group", "topk_group", "norm_topk_prob", "moe_latent_size", "n_shared_experts")
FOUR = ("ssm_in", "ssm_out", "attn_q", "attn_output", "ffn_up_exps", "ffn_up_shexp")
FILES: dict[str, tuple[str, str, dict[str, str]]] = {  # model, type, types of single tensors
    "experts-head-bf16": ("experts", "bf16", {}),
    "experts-q8_0": ("experts", "Q8_0", {}),
    "experts-q4_0": ("experts", "Q4_0", {}),
    "experts-mxfp4": ("experts", "MXFP4_MOE", {}),
    "experts-nvfp4": ("experts", "Q8_0", dict.fromkeys(FOUR, "nvfp4")),
    "experts-mixed": (
        "experts", "Q8_0",
        {"ssm_in": "q4_1", "ssm_out": "q5_0", "attn_q": "q5_1", "attn_output": "iq4_nl",
         "ffn_up_exps": "q4_1"},
    ),
    "dense-q4_k": ("dense", "Q4_K_M", {}),
    "dense-mixed": (
        "dense", "Q4_K_M",
        {"ssm_in": "q2_k", "attn_q": "q3_k", "attn_k": "q5_k", "attn_v": "iq4_xs", "ffn_up": "q6_k"},
    ),
}  # fmt: skip
CONVERT = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import ModelBase, TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "tekken"
config = json.load(open(sys.argv[2] + "/config.json"))
if "num_experts_per_tok" not in config:
    ModelBase.load_hparams = staticmethod(lambda *_, **__: dict(config))
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""


def original(directory: Path, name: str, **sizes: int) -> Path:
    """Write a model in the Hugging Face layout, with a tokenizer of a few tokens; return the directory.

    sizes  of config.json that are to be others than those of the model
    """
    cfg = Config.from_hf(MODELS[name] | sizes | {"model_type": "nemotron_h"})
    write(directory, cfg, random_values(cfg, SEED))
    settings = {"use_bias": False, "mamba_proj_bias": False} | cfg.to_hf()
    if "E" not in cfg.layers:  # llama.cpp takes groups of experts for experts
        settings = {key: value for key, value in settings.items() if key not in OF_EXPERTS}
    (directory / "config.json").write_text(json.dumps(settings))
    for other in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / other, directory / other)
    file = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    known = [token["content"] for token in file["added_tokens"]] + list("abcdefghijklmnopqrstuvwxyz.,ĠĊ")
    tokens = known + ["".join(pair) for pair in MERGES]
    file["model"] |= {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": MERGES}
    (directory / "tokenizer.json").write_text(json.dumps(file))
    return directory


def converted(source: Path, directory: Path, out: Path, dtype: str, *more: str) -> Path:
    """Run llama.cpp's converter on a directory; return the file. RuntimeError tells why it failed."""
    how = [sys.executable, "-c", CONVERT, source, directory, "--outfile", out, "--outtype", dtype, *more]
    return _made(out, how)


def quantized(programs: Path, path: Path, out: Path, kind: str, *more: str) -> Path:
    """Run llama-quantize on a file; return the new file. RuntimeError tells why it failed."""
    return _made(out, [programs / "llama-quantize", *more, path, out, kind, "2"])


def _made(out: Path, command: list) -> Path:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode or not out.exists():
        raise RuntimeError(f"{command[0]} failed: {(done.stderr + done.stdout)[-2000:]}")
    return out


def record(out: Path, source: Path, programs: Path) -> None:
    """Write all files."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wide = {}
        for name in MODELS:
            directory = original(Path(folder) / name, name)
            (directory / "chat_template.jinja").unlink()
            wide[name] = converted(source, directory, Path(folder) / f"{name}.gguf", "f32", "--no-mtp")
        for file, (name, kind, more) in FILES.items():
            path = out / f"{file}.gguf"
            if kind == "bf16":
                original(Path(folder) / name, name)
                converted(source, Path(folder) / name, path, kind)
            else:
                types = [
                    word for tensor, other in more.items() for word in ("--tensor-type", f"{tensor}={other}")
                ]
                quantized(programs, wide[name], path, kind, *types)


if __name__ == "__main__":
    record(*map(Path, sys.argv[1:4]))

"""The most memory the torch backend held, above that of `import torch`, and what it should be.

    python -m tools.bench.torch_memory MODEL [--dtype bfloat16] [--threads 1] [--prompt 512] [--steps 8]

Should be: every weight, the state, and what one chunk of the prompt needs on its way through the widest
mixer. Weights are pages of the file's memory map, so what is not of the file is told apart (on Linux).
"""

from __future__ import annotations

import argparse
import re
import threading
import time
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def held(kind: str) -> int:
    """Return the bytes of memory: VmHWM the most so far, RssAnon now, without the pages of files."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+)", STATUS.read_text())[1])


class Highest(threading.Thread):
    """Looks at the memory that is no file's, a thousand times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = 0, False

    def run(self):
        while not self.over:
            self.most = max(self.most, held("RssAnon"))
            time.sleep(1e-3)


def activations(cfg, rows: int) -> int:
    """Return the bytes in float32 of the stream and the arrays of the widest mixer, for `rows` positions."""
    d, inner, heads = cfg.hidden_size, cfg.mamba_num_heads * cfg.mamba_head_dim, cfg.num_attention_heads
    k, x = cfg.num_experts_per_tok, cfg.moe_latent_size or cfg.hidden_size
    widths = {
        "M": sum(cfg.in_proj_widths) + cfg.conv_dim + 2 * inner,
        "*": sum(cfg.qkv_widths) + heads * cfg.head_dim,
        "E": k * cfg.moe_intermediate_size + cfg.moe_shared_expert_intermediate_size + 2 * x,
        "-": cfg.intermediate_size,
    }
    return 4 * rows * (4 * d + max(widths[kind] for kind in set(cfg.layers)))


def size(states: list) -> int:
    """Return the bytes of states, with the room that caches have for more."""
    return sum(a.nbytes for s in states if s for a in vars(s).values() if isinstance(a, torch.Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    all_before, own_before = held("VmHWM"), held("RssAnon")
    highest = Highest()
    highest.start()

    from refengine.backends.pytorch import torch_backend
    from refengine.checkpoint import Checkpoint
    from refengine.runner import PREFILL, LocalRunner, chunk_length
    from refengine.spec.model import Model
    from refengine.spec.tensors import parameters, table

    checkpoint = Checkpoint.open(arguments.model)
    backend = torch_backend(arguments.dtype, threads=arguments.threads)
    model = Model.build(checkpoint.config, checkpoint.read, backend)
    cfg = model.cfg
    runner, states = LocalRunner(model), model.new_states(1)
    prompt = torch.randint(cfg.vocab_size, (1, arguments.prompt))
    for start in range(0, arguments.prompt, chunk_length(cfg)):
        h, states = runner.blocks(prompt[:, start : start + chunk_length(cfg)].numpy(), states)
    runner.head(h[:, -1:])
    for _ in range(arguments.steps):
        h, states = model.blocks(model.embed(torch.randint(cfg.vocab_size, (1, 1))), states)
        model.head(h)
    highest.over = True
    highest.join()
    weights = parameters(table(cfg)) * (2 if arguments.dtype == "bfloat16" else 4)
    state, chunk = size(states), activations(cfg, min(PREFILL, arguments.prompt))
    rest, most = highest.most - own_before, held("VmHWM") - all_before
    mb = [round(b / 1e6) for b in (weights, state, chunk, weights + state + chunk, most, rest)]
    print("| prompt | weights | state | one chunk | together | held | over together | no file |  (MB)")
    print("|---" * 8 + "|")
    print("| " + " | ".join(map(str, [arguments.prompt, *mb[:5], f"{mb[4] / mb[3]:.2f}", mb[5]])) + " |")


if __name__ == "__main__":
    main()

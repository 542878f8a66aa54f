"""A rank touches as many bytes of a checkpoint as refengine.ranks.load.bytes_read states.

The kernel counts them in a fresh process: the pages of the file's map that were filled, from a file that is
not in memory yet, page by page. (By default Linux reads ahead, so the disk reads more.)
"""

import json
import mmap
import os
import subprocess
import sys

import pytest

from refengine.checkpoint import Checkpoint
from refengine.ranks.comm import Solo
from refengine.ranks.load import bytes_read
from refengine.spec.config import Config
from refengine.spec.layout import plan
from refengine.spec.ops import numpy_backend
from refengine.spec.ranks import part
from refengine.spec.shard import Shard, held, held_tensors
from tests.support.checkpoints import random_checkpoint

PAGE = mmap.PAGESIZE
WIDE = Config.from_hf(
    {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "ME*-E",
        "vocab_size": 4096,
        "hidden_size": 256,
        "max_position_embeddings": 512,
        "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "n_groups": 4,
        "ssm_state_size": 64,
        "conv_kernel": 4,
        "chunk_size": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 320,
        "moe_shared_expert_intermediate_size": 512,
        "intermediate_size": 640,
        "moe_latent_size": 192,
        "routed_scaling_factor": 2.5,
    }
)


def filled(path) -> int:
    """Return the bytes of the maps of a file that are resident in this process."""
    total, here = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if "-" in line.split(" ")[0]:
                here = line.rstrip().endswith(str(path))
            elif here and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def build(directory: str, rank: int, *layout: int) -> dict[str, int]:
    """Load a rank's part of a checkpoint; return the resident bytes before and after."""
    checkpoint = Checkpoint.open(directory)
    file = checkpoint.files[0]
    with open(file.path, "rb") as again:
        os.fsync(again.fileno())
        os.posix_fadvise(again.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file.map.madvise(mmap.MADV_RANDOM)
    before = filled(file.path)
    shard = Shard(plan(checkpoint.config, *layout), rank)
    part(checkpoint.config, checkpoint.read, numpy_backend("float32"), shard, Solo())
    return {"before": before, "filled": filled(file.path)}


if __name__ == "__main__":
    print(json.dumps(build(sys.argv[1], *map(int, sys.argv[2:]))))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDE)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="there is no /proc/self/smaps")
@pytest.mark.parametrize("tp, ep, pp, rank", [(1, 4, 1, 3), (1, 2, 2, 0), (4, 1, 1, 3), (2, 2, 1, 0)])
def test_a_rank_touches_the_bytes_that_it_says_and_a_page_a_piece(directory, tp, ep, pp, rank):
    command = [sys.executable, "-m", "tests.ranks.test_reads", directory, rank, tp, ep, pp]
    found = json.loads(subprocess.check_output(list(map(str, command))))
    shard = Shard(plan(WIDE, tp, ep, pp), rank)
    said = bytes_read(WIDE, shard)
    touched = said["touched"].total()
    pieces = sum(len(held(row, WIDE, shard)[1]) for row in held_tensors(WIDE, shard))
    assert found["before"] == 0
    assert touched <= found["filled"] <= touched + PAGE * pieces
    assert tp > 1 or touched == said["kept"].total()

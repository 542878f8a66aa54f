"""A layer may have one expert, and a byte at either end of a file changes the digest."""

import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.directory import EDGE
from refengine.checkpoint.write import write
from refengine.conformance.cases import Case, random_tensors
from refengine.spec.tensors import table


@settings(max_examples=8)
@given(
    experts=st.sampled_from((1, 2, 9)),
    stacked=st.booleans(),
    shards=st.integers(1, 4),
    prefix=st.sampled_from(("backbone.", "model.")),
    latent=st.sampled_from((20, None)),
)
@example(experts=1, stacked=True, shards=1, prefix="model.", latent=None)
@example(experts=1, stacked=True, shards=3, prefix="backbone.", latent=20)
def test_any_number_of_experts_is_read_back_from_any_layout(
    tmp_path_factory, experts, stacked, shards, prefix, latent
):
    case = Case(layers="ME", n_routed_experts=experts, num_experts_per_tok=1, moe_latent_size=latent)
    tensors, directory = random_tensors(case.cfg, 3), tmp_path_factory.mktemp("model")
    write(directory, case.cfg, lambda row: tensors[row.name], stacked=stacked, shards=shards, prefix=prefix)
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.config == case.cfg
        for name, value in tensors.items():
            assert np.array_equal(checkpoint.read(name), value), name
        assert [checkpoint.bytes_of(row) for row in table(case.cfg)] == [v.nbytes for v in tensors.values()]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_byte_at_either_end_of_any_file_changes_the_digest(tmp_path, shards):
    """So ranks with different weights are detected; an equal copy has the same digest."""
    case = Case(layers="M*" * 24, hidden_size=28)
    tensors = random_tensors(case.cfg, 3)
    write(tmp_path / "model", case.cfg, lambda row: tensors[row.name], shards=shards)

    def digest(directory) -> str:
        with Checkpoint.open(directory) as checkpoint:
            return checkpoint.digest()

    first = digest(tmp_path / "model")
    assert digest(shutil.copytree(tmp_path / "model", tmp_path / "copy")) == first
    seen = {first}
    for i, path in enumerate(sorted((tmp_path / "model").glob("*.safetensors"))):
        raw = path.read_bytes()
        assert len(raw) > 3 * EDGE, "its ends do not meet"
        start = 8 + int.from_bytes(raw[:8], "little")
        for at in (start, start + 1, len(raw) - 2, len(raw) - 1):
            other = shutil.copytree(tmp_path / "model", tmp_path / f"other-{i}-{at}")
            (other / path.name).write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            seen.add(digest(other))
    assert len(seen) == 1 + 4 * shards

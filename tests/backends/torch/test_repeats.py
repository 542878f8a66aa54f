"""On a CPU every run gives the same bits: the order of each sum does not depend on threads."""

import numpy as np
import pytest

from refengine.conformance.cases import Case
from refengine.spec.model import Model
from tests.backends.torch.test_laws import step
from tests.support.torch_benches import torch
from tests.support.tries import thorough

from refengine.backends.pytorch import torch_backend  # isort: skip

CASE = Case(layers="ME*-", batch=3, length=300, hidden_size=260, head_dim=60, moe_latent_size=100)


@pytest.fixture
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, compiled",
    [("float32", False), ("bfloat16", True), *thorough(("float32", True), ("bfloat16", False))],
)
def test_two_threads_give_the_same_bits_every_time(threads_as_they_were, dtype, compiled):
    """A prompt in two chunks, then a token at a time, with rows of different lengths."""
    backend = torch_backend(dtype, threads=2, deterministic=True, compiled=compiled)
    assert torch.get_num_threads() == 2
    m, first = Model.build(CASE.cfg, CASE.read, backend), None
    for _ in range(2):
        logits = np.concatenate(list(read(m)), axis=1)
        first = logits if first is None else first
        assert np.array_equal(logits, first)


def read(m: Model):
    states, at = m.new_states(CASE.batch), 0
    for count in (200, 60, *[1] * 6):
        real = np.minimum(count, [count, 150, 30])
        logits, states = step(m, CASE.ids[:, at : at + count], states, real)
        at += count
        yield logits * (np.arange(count) < real[:, None])[..., None]

"""`refengine bench` counts every byte that a step must read, and its contexts have the stated lengths."""

import numpy as np
import pytest

from refengine import bench
from refengine.conformance.cases import Case
from refengine.runner import LocalRunner
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.tensors import parameters, table
from tests.support.torch_benches import Torch

CASE = Case(layers="M*E-", batch=1)


def model(backend):
    return Model.build(CASE.cfg, CASE.read, backend)


@pytest.fixture(params=["numpy", "torch"])
def built(request):
    return LocalRunner(
        model(numpy_backend(np.float32) if request.param == "numpy" else Torch("torch-float32", "float32")())
    )


def test_a_step_of_a_huge_batch_reads_every_weight_but_the_embeddings():
    cfg = CASE.cfg
    all_but = (
        parameters(table(cfg)) - cfg.vocab_size * cfg.hidden_size - cfg.hidden_size
    )  # and the final norm
    states = 10**6 * 4 * cfg.mamba_num_heads * cfg.mamba_head_dim * cfg.ssm_state_size
    assert bench.bytes_a_step(cfg, 2, 2, 10**6, 0) == pytest.approx(2 * all_but + states)


def test_a_longer_context_adds_its_keys_and_values():
    cfg = CASE.cfg
    more = bench.bytes_a_step(cfg, 2, 4, 3, 100) - bench.bytes_a_step(cfg, 2, 4, 3, 0)
    assert more == pytest.approx(3 * 100 * 2 * 4 * cfg.num_key_value_heads * cfg.head_dim)


@pytest.mark.parametrize("context", [1, 2, 70])
def test_a_context_is_as_long_as_was_asked(built, context):
    cache = built.filled(2, context, built.model.backend)[1]
    assert [int(n) for n in cache.length] == [context, context]


def test_a_row_for_the_machine_and_for_all_that_was_asked(built):
    rows = list(bench.bench(built, "float32", 1, [5, 9], [1, 2], [4], repeat=1, steps=1, host=False))
    asked = [(row["what"], row.get("batch"), row.get("tokens")) for row in rows]
    assert asked == [
        ("machine", None, None),
        ("prefill", 1, 5),
        ("prefill", 1, 9),
        ("decode", 1, 4),
        ("decode", 2, 4),
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows[1:])


def test_the_peak_of_a_backend_is_measured_by_its_own_product(built):
    assert bench.matrix_peak(built.model, size=64) > 0

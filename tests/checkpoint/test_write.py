"""Writing leaves a whole model or nothing, and random weights have the scale of trained ones."""

import numpy as np
import pytest

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import write
from refengine.spec.config import InputError
from refengine.spec.tensors import table
from tests.support.checkpoints import CONFIGS, expected, random_checkpoint


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    cfg = CONFIGS["latent"]
    values = random_values(cfg)

    def failing(row):
        if row.name.startswith("backbone.layers.2."):
            raise RuntimeError("out of luck")
        return values(row)

    with pytest.raises(RuntimeError, match="out of luck"):
        write(tmp_path, cfg, failing, shards=3)
    assert not list(tmp_path.iterdir())


def test_a_write_replaces_its_own_files_and_no_others(tmp_path):
    cfg = CONFIGS["mamba"]
    random_checkpoint(tmp_path, cfg, seed=1)
    random_checkpoint(tmp_path, cfg, seed=2)
    row = table(cfg)[0]
    assert np.array_equal(Checkpoint.open(tmp_path).read(row.name), expected(row, cfg, seed=2))
    with pytest.raises(InputError, match=r"holds model\.safetensors"):
        random_checkpoint(tmp_path, cfg, shards=2)
    assert np.array_equal(Checkpoint.open(tmp_path).read(row.name), expected(row, cfg, seed=2))


def test_values_of_the_wrong_shape_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"embeddings\.weight is"):
        write(tmp_path, CONFIGS["mamba"], lambda row: np.zeros((2, *row.shape)))


def test_random_weights_are_as_in_a_trained_model():
    cfg = CONFIGS["head"]
    values = random_values(cfg, seed=3)
    for row in table(cfg):
        value = values(row)
        assert value.shape == row.shape and value.dtype == np.float32 and np.isfinite(value).all(), row.name
        assert np.array_equal(value, random_values(cfg, seed=3)(row)), "the seed and the name decide"
        if row.key.endswith("A_log"):
            assert np.exp(value).min() >= 1 and np.exp(value).max() <= 16
        if row.key.endswith("dt_bias"):
            dt = np.logaddexp(0, value)
            assert dt.min() > 2.9e-4 and dt.max() < 0.31

"""Random weights like trained ones: signals keep their size, decays differ, routers use all experts.

A tensor's values depend on the seed and its name alone, not on the division into files.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from zlib import crc32

import numpy as np

from refengine.spec.config import Config
from refengine.spec.tensors import Tensor

INTO_THE_STREAM = ("out_proj.weight", "o_proj.weight", "fc2_latent_proj.weight", "down_proj.weight")


def random_values(cfg: Config, seed: int = 0) -> Callable[[Tensor], np.ndarray]:
    """Return a function from a row of the table to its values, float32, for `write` and `Model.build`."""

    def values(row: Tensor) -> np.ndarray:
        rng = np.random.default_rng([seed, crc32(row.name.encode())])
        key = row.key.removeprefix("mixer.")

        def normal() -> np.ndarray:
            return rng.standard_normal(row.shape, dtype=np.float32)

        match key:
            case "A_log":  # A from 1 to 16
                return np.log(rng.uniform(1, 16, row.shape)).astype(np.float32)
            case "dt_bias":  # softplus of it, log-uniform from 0.0003 to 0.3
                dt = np.exp(rng.uniform(np.log(3e-4), np.log(0.3), row.shape))
                return np.log(np.expm1(dt)).astype(np.float32)
            case "gate.e_score_correction_bias" | "conv1d.bias":
                return 0.1 * normal()
            case "gate.weight":
                return 1.5 * normal() / np.float32(sqrt(row.shape[-1]))
            case "embeddings.weight":  # a look-up sums over one row
                return normal()
            case _ if len(row.shape) == 1:  # the norms, and D
                return 1 + 0.2 * normal()
        in_latent = row.role == "routed_expert" and cfg.moe_latent_size
        layers = len(cfg.layers) if key.endswith(INTO_THE_STREAM) and not in_latent else 1
        return normal() / np.float32(sqrt(row.shape[-1] * layers))

    return values

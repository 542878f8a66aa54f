"""How fast a model runs here, and what share that is of what the machine can do.

    prefill  tokens/s for prompts of several lengths; their products over the measured peak of matrix products
    decode   tokens/s for several batches and contexts; the bytes a step must read over the read bandwidth

A context is filled with random keys and values, so that a long one takes no longer to prepare than to store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from refengine.engine import PREFILL
from refengine.machine import forget_peak, peak_memory
from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import Config
from refengine.spec.model import Model
from refengine.spec.ops import Backend
from refengine.spec.tensors import active_parameters, table


def seconds(work: Callable, repeat: int) -> float:
    """The median of `repeat` runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory together, the best of five."""
    parts = [np.ones(2**24 // max(1, threads // 16), np.int64) for _ in range(threads)]  # of 128 MB at most
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            times.append(time.perf_counter() - began)
    return sum(part.nbytes for part in parts) / min(times)


def matrix_peak(model: Model, size: int = 2048) -> float:
    """Operations a second in the backend's product of 512 rows and a square matrix."""
    from types import SimpleNamespace

    from refengine.spec.arrays import DTYPES
    from refengine.spec.tensors import Group

    rng, here = np.random.default_rng(0), model.backend
    values = rng.standard_normal((size, size), np.float32).astype(DTYPES["BF16"])
    group = Group("", False, "bench", [SimpleNamespace(precision="matrix")])
    weight = here.place(group, [values])
    table = here.place(group, [rng.standard_normal((512, size), np.float32).astype(DTYPES["BF16"])])
    x = here.ops.embed(here.array(np.arange(512)[None]), table)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        here.fetch(here.ops.linear(x, weight)[:, -1:, -1:])
        times.append(time.perf_counter() - began)
    return 2 * 512 * size**2 / min(times)


def bytes_a_step(cfg: Config, width: int, cached: int, batch: int, context: int) -> float:
    """What one decoding step reads at least: weights that some token meets, S, keys and values.

    width: bytes of a weight; cached: of a number in the key/value cache.
    """
    total, head = 0.0, "embedding" if cfg.tie_word_embeddings else "lm_head"
    for row in table(cfg):
        if (
            row.role == "routed_expert"
        ):  # the share of experts that `batch` tokens meet, if they choose evenly
            total += row.size * width * (1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** batch)
        elif row.block.startswith("layers.") or row.role == head:
            total += row.size * width
    S = 4 * cfg.mamba_num_heads * cfg.mamba_head_dim * cfg.ssm_state_size
    kv = 2 * cfg.num_key_value_heads * cfg.head_dim * cached * context
    return total + batch * (S * cfg.layers.count("M") + kv * cfg.layers.count("*"))


def prefill(model: Model, ids: np.ndarray) -> list:
    """Read sequences [b l] as the engine does, up to the logits of the last position."""
    states, here, chunk = model.new_states(len(ids)), model.backend, max(1, model.cfg.chunk_size)
    step = max(1, PREFILL // chunk) * chunk
    for start in range(0, ids.shape[1], step):
        h, states = model.blocks(model.embed(here.array(ids[:, start : start + step])), states)
    here.fetch(model.head(h[:, -1:]))
    return states


def with_context(model: Model, batch: int, context: int) -> list:
    """States of sequences that have read `context` positions of noise."""
    states, here = prefill(model, np.zeros((batch, 1), np.int64)), model.backend
    dtype = here.fetch(model.embed(here.array(np.zeros((1, 1), np.int64)))).dtype  # of an activation
    return filled(states, here, model.cfg, batch, context, dtype)


def filled(states: list, here: Backend, cfg: Config, batch: int, context: int, dtype) -> list:
    """States of sequences that have read one position, with `context` - 1 more."""
    rng, known = np.random.default_rng(0), 1
    while known < context:
        more = min(4096, context - known)
        shape = batch, more, cfg.num_key_value_heads, cfg.head_dim
        noise = rng.standard_normal(shape, np.float32).astype(dtype)
        states = [
            s.append(here.array(noise), here.array(noise)) if hasattr(s, "append") else s for s in states
        ]
        known += more
    return states


def decode_seconds(model: Model, batch: int, context: int, steps: int) -> float:
    """The median time of one step."""
    states, here, times = with_context(model, batch, context), model.backend, []
    rng = np.random.default_rng(1)
    for _ in range(steps + 2):
        began = time.perf_counter()
        ids = rng.integers(0, model.cfg.vocab_size, (batch, 1))
        if here.step:
            _, states = here.step(model, ids[:, 0], states)
        else:
            h, states = model.blocks(model.embed(here.array(ids)), states)
            here.fetch(model.head(h))
        times.append(time.perf_counter() - began)
    return median(times[2:])


def bench(
    model: Model,
    dtype: str,
    threads: int,
    prompts: list[int],
    batches: list[int],
    contexts: list[int],
    repeat: int = 3,
    steps: int = 16,
    host: bool = True,
) -> Iterator[dict]:
    """A row for the machine, then one a measurement. Not on the `host`: no shares of the machine."""
    cfg = model.cfg
    peak, bandwidth = (matrix_peak(model), read_bandwidth(threads)) if host else (None, None)
    yield {"what": "machine", "threads": threads, "bandwidth": bandwidth, "matrix_peak": peak}
    forget_peak()  # of what measured the machine
    rng, cached = np.random.default_rng(0), model.backend.new_state("*", cfg, 1).k.itemsize
    for length in prompts:
        ids = rng.integers(0, cfg.vocab_size, (1, length))
        took = seconds(lambda ids=ids: prefill(model, ids), repeat)
        share = 2 * active_parameters(cfg) * length / took / peak if host else None
        yield prefill_row(length, took, share, peak_memory())
    for context in contexts:
        for batch in batches:
            took = decode_seconds(model, batch, context, steps)
            need = bytes_a_step(cfg, ITEMSIZE[dtype], cached, batch, context)
            share = need / took / bandwidth if host else None
            yield decode_row(batch, context, took, share, peak_memory())


def prefill_row(length: int, took: float, share: float | None, memory: int) -> dict:
    return {
        "what": "prefill",
        "batch": 1,
        "tokens": length,
        "tokens_per_second": length / took,
        "share": share,
        "peak_memory": memory,
    }


def decode_row(batch: int, context: int, took: float, share: float | None, memory: int) -> dict:
    return {
        "what": "decode",
        "batch": batch,
        "tokens": context,
        "tokens_per_second": batch / took,
        "milliseconds": 1e3 * took,
        "share": share,
        "peak_memory": memory,
    }

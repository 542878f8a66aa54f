"""Measure how fast a model runs here, and the share of what the machine can do.

    prefill  tokens/s for prompts of several lengths; their products over the measured peak of matrix products
    decode   tokens/s for several batches and contexts; the bytes a step must read over the read bandwidth

A context is filled with random keys and values, so that a long one takes no longer to prepare than to store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

from refengine.machine import forget_peak
from refengine.runner import How, Part, Runner, chunk_length
from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import Config
from refengine.spec.model import Model
from refengine.spec.sample import Sampling
from refengine.spec.tensors import active_parameters, table


def seconds(work: Callable, repeat: int) -> float:
    """Return the median seconds of `repeat` runs, after one that is not counted."""
    work()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def read_bandwidth(threads: int) -> float:
    """Return the bytes a second that `threads` threads read from memory together, the best of five."""
    parts = [np.ones(2**24 // max(1, threads // 16), np.int64) for _ in range(threads)]  # of 128 MB at most
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            times.append(time.perf_counter() - began)
    return sum(part.nbytes for part in parts) / min(times)


def matrix_peak(model: Model, size: int = 2048) -> float:
    """Return operations a second in the backend's product of 512 rows and a square matrix."""
    from refengine.spec.arrays import DTYPES
    from refengine.spec.tensors import Group, Tensor

    rng, here = np.random.default_rng(0), model.backend
    values = rng.standard_normal((size, size), np.float32).astype(DTYPES["BF16"])
    row = Tensor("bench", (size, size), "BF16", "", "bench", "mlp", "bench", "whole", "matrix")
    group = Group("", False, "bench", [row])
    weight = here.place(group, [values])
    table = here.place(group, [rng.standard_normal((512, size), np.float32).astype(DTYPES["BF16"])])
    x = here.ops.embed(here.array(np.arange(512)[None]), table)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        here.fetch(here.ops.linear(x, weight)[:, -1:, -1:])
        times.append(time.perf_counter() - began)
    return 2 * 512 * size**2 / min(times)


def bytes_a_step(
    cfg: Config,
    width: int,
    cached: int,
    batch: int,
    context: int,
    packed: Mapping[str, int] = {},
    of_S: int = 4,
) -> float:
    """Return the bytes that a decoding step must read: weights that some token meets, S, keys and values.

    width: bytes of a weight; cached: of a number in the key/value cache; of_S: of a number in S. packed: the
    bytes of each tensor that the backend reads as it is packed in the files, by name.
    """
    total, head = 0.0, "embedding" if cfg.tie_word_embeddings else "lm_head"
    for row in table(cfg):
        if (
            row.role == "routed_expert"
        ):  # the share of experts that `batch` tokens meet, if they choose evenly
            share = 1 - (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** batch
            total += share * packed.get(row.name, row.size * width)
        elif row.block.startswith("layers.") or row.role == head:
            total += packed.get(row.name, row.size * width)
    S = of_S * cfg.mamba_num_heads * cfg.mamba_head_dim * cfg.ssm_state_size
    kv = 2 * cfg.num_key_value_heads * cfg.head_dim * cached * context
    return total + batch * (S * cfg.layers.count("M") + kv * cfg.layers.count("*"))


def prefill(runner: Runner, ids: list[int]) -> None:
    """Read one prompt, up to the token that is drawn after it, and forget it."""
    chunk = chunk_length(runner.config)
    for start in range(0, len(ids), chunk):
        how = None if start else How(Sampling(temperature=0))
        runner.read([Part(0, ids[start : start + chunk], how, start + chunk >= len(ids))])
    runner.drop([0])


def prefill_seconds(runner: Runner, ids: list[int], repeat: int) -> float:
    """Return the median seconds to read one prompt."""
    return seconds(lambda: prefill(runner, ids), repeat)


def decode_seconds(runner: Runner, batch: int, context: int, steps: int) -> float:
    """Return the median seconds of one step of `batch` sequences, each after `context` tokens."""
    slots, times, rng = list(range(batch)), [], np.random.default_rng(1)
    runner.fill(slots, context)
    for _ in range(steps + 2):
        ids = rng.integers(0, runner.config.vocab_size, batch).tolist()
        began = time.perf_counter()
        runner.step(slots, ids, draw=False)
        times.append(time.perf_counter() - began)
    runner.drop(slots)
    return median(times[2:])


def bench(
    runner: Runner,
    dtype: str,
    threads: int,
    prompts: list[int],
    batches: list[int],
    contexts: list[int],
    repeat: int = 3,
    steps: int = 16,
    host: bool = True,
    packed: Mapping[str, int] = {},
) -> Iterator[dict]:
    """Return a row for the machine, then one a measurement.

    host: whether the model runs in this process on this machine's CPU, so that shares of the machine are
    measured. Memory is that of the process or the rank that took most.
    """
    cfg, model = runner.config, runner.model
    peak, bandwidth = (matrix_peak(model), read_bandwidth(threads)) if host else (None, None)
    yield {"what": "machine", "threads": threads, "bandwidth": bandwidth, "matrix_peak": peak}
    forget_peak()  # of what measured the machine
    rng, new_state = np.random.default_rng(0), model.backend.new_state
    cached, of_S = new_state("*", cfg, 1).k.itemsize, new_state("M", cfg, 1).S.itemsize
    for length in prompts:
        ids = rng.integers(0, cfg.vocab_size, length).tolist()
        took = prefill_seconds(runner, ids, repeat)
        share = 2 * active_parameters(cfg) * length / took / peak if peak else None
        yield prefill_row(length, took, share, runner.peak_memory())
    for context in contexts:
        for batch in batches:
            took = decode_seconds(runner, batch, context, steps)
            need = bytes_a_step(cfg, ITEMSIZE[dtype], cached, batch, context, packed, of_S)
            share = need / took / bandwidth if bandwidth else None
            yield decode_row(batch, context, took, share, runner.peak_memory())


def prefill_row(length: int, took: float, share: float | None, memory: int) -> dict:
    """Return the row of a prompt of `length` tokens that took `took` seconds."""
    return {
        "what": "prefill",
        "batch": 1,
        "tokens": length,
        "tokens_per_second": length / took,
        "share": share,
        "peak_memory": memory,
    }


def decode_row(batch: int, context: int, took: float, share: float | None, memory: int) -> dict:
    """Return the row of a step of `batch` sequences that took `took` seconds."""
    return {
        "what": "decode",
        "batch": batch,
        "tokens": context,
        "tokens_per_second": batch / took,
        "milliseconds": 1e3 * took,
        "share": share,
        "peak_memory": memory,
    }

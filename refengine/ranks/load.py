"""Load one rank's part of a model, and check that all ranks agree on version, checkpoint, layout and dtype.

    mpiexec -n 4 refengine generate --tp 2 --ep 2 ...
    torchrun --nproc-per-node 2 -m refengine generate --backend torch --tp 2 ...

`load` is refengine.load for one rank: an Engine over the RankRunner of runner.py.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from refengine import backend as backends
from refengine.checkpoint import Checkpoint
from refengine.engine import Engine, check_load, limit_threads
from refengine.loop import SLOTS
from refengine.machine import processors
from refengine.progress import progress
from refengine.ranks.comm import TIMEOUT, Ranks
from refengine.ranks.comm.connect import connect
from refengine.ranks.launcher import Launch, launched
from refengine.ranks.runner import RankRunner
from refengine.spec import ranks
from refengine.spec.arrays import DTYPES, Weight
from refengine.spec.config import Config, InputError
from refengine.spec.layout import Layout, plan
from refengine.spec.ops import Backend
from refengine.spec.shard import Shard, held, held_tensors
from refengine.spec.tensors import parameters, table
from refengine.speculation import has_layer_norm
from refengine.storage import storage


def load(
    model: str | Path | Checkpoint = "tiny",
    backend: str = "numpy",
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    deterministic: bool = False,
    *,
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    timeout: float = TIMEOUT,
    batch: int = SLOTS,
    batch_invariant: bool = False,
    cache: int = 0,
    cache_dir: str | Path | None = None,
    kv_dtype: str | None = None,
    ssm_dtype: str | None = None,
    packed_inputs: bool = False,
    mtp_norm: str = "rms",
) -> Engine:
    """Return the engine of this rank, with its part of the model; every rank of the job makes the same call.

    Arguments are those of refengine.load, and: threads of each rank, by default its share of the host's
    processors; tp, ep, pp: sizes of the layout; timeout: seconds without a heartbeat after which a rank
    counts as lost. Raises InputError for files or options that are wrong, RankError for a rank that is lost
    or differs from the others.
    """
    began = time.perf_counter()
    check_load(model, threads, batch, cache, cache_dir)
    here = launched()
    check_count(here.launcher, here.count, tp, ep, pp)
    if backend == "cuda":
        raise InputError(
            "the cuda backend runs on one GPU; for several: torchrun, --backend torch --device cuda"
        )
    device = own_device(device or "cpu", here)
    if backend == "auto":
        backend = backends.automatic(device, dtype, here.count, batch_invariant, packed_inputs)[0]
    comm = connect(timeout, device, deterministic)
    threads = threads or max(1, processors() // here.local_count)
    limit_threads(threads)
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    if packed_inputs:
        checkpoint.check_packed_inputs()
    cfg = checkpoint.config
    dtype = checkpoint.auto_dtype(backend) if dtype == "auto" else dtype
    shard = Shard(plan(cfg, tp, ep, pp), comm.rank)
    stored, layer_norm = storage(checkpoint, kv_dtype, ssm_dtype), has_layer_norm(cfg, mtp_norm)
    how = f"{backend} in {dtype}" + (", batch-invariant" if batch_invariant else "")
    how += "".join(
        f", {name} in {value}" for name, value in (("cache", stored.kv), ("S", stored.ssm)) if value
    )
    how += ", with packed inputs" if packed_inputs else ""
    how += ", with a LayerNorm in the head" if layer_norm else ""
    comm.compare(identity(checkpoint, shard.layout, how))
    mine = held_tensors(cfg, shard)
    share = here.local_count * sum(sizes(row, cfg, shard)[0] for row in mine) / parameters(table(cfg))
    made = backends.make(
        backend, cfg, dtype, device, threads, deterministic, share, checkpoint.packed, batch_invariant,
        stored.kv, stored.ssm, packed_inputs=packed_inputs,
    )  # fmt: skip
    chosen = with_heartbeats(made, comm)
    checkpoint = checkpoint.with_packing_note(chosen.name, chosen.packed)
    with progress("loading", len(mine), "tensor", silent=comm.rank > 0) as bar:

        def read(name: str) -> Weight:
            bar.update()
            comm.at_work()
            return checkpoint.read(name)

        built = ranks.part(cfg, read, chosen, shard, comm)
        built = replace(built, scales=stored.scales, head_layer_norm=layer_norm)
    checkpoint.release()
    runner = RankRunner(built, cfg, comm, shard, chosen)
    return Engine(checkpoint, runner, time.perf_counter() - began, batch, cache, batch_invariant, cache_dir)


def with_heartbeats(backend: Backend, comm: Ranks) -> Backend:
    """Return the backend with a heartbeat before each layer, which keeps waiting ranks from timing out."""

    def rms_norm(*args):
        comm.at_work()
        return backend.ops.rms_norm(*args)

    return replace(backend, ops=replace(backend.ops, rms_norm=rms_norm))


def own_device(device: str, here: Launch) -> str:
    """Return the device of this rank: under torchrun, "cuda" and "auto" select the GPU of its local rank."""
    if here.launcher != "torchrun" or device not in ("cuda", "auto"):
        return device
    from torch import cuda

    return "cpu" if device == "auto" and not cuda.is_available() else f"cuda:{here.local_rank}"


def check_count(launcher: str, count: int, tp: int, ep: int, pp: int) -> None:
    """Raise InputError unless the number of ranks started is that of the layout."""
    if count == tp * ep * pp:
        return
    layout = f"tp = {tp}, ep = {ep}, pp = {pp}"
    if not launcher:
        n = tp * ep * pp
        raise InputError(
            f"{layout} needs {n} ranks: start them with mpiexec -n {n} refengine ..., "
            f"or torchrun --nproc-per-node {n} -m refengine ..."
        )
    raise InputError(f"{launcher} started {count} ranks, and {layout} needs {tp * ep * pp}")


def identity(checkpoint: Checkpoint, layout: Layout, how: str) -> dict[str, str]:
    """Return by name the values that must be equal on all ranks."""
    from refengine import __version__

    return {
        "version of refengine": __version__,
        "layout": f"tp {layout.tp}, ep {layout.ep}, pp {layout.pp}",
        "checkpoint": f"{checkpoint.directory.name} ({checkpoint.digest()[:16]})",
        "backend and dtype": how,
    }


def sizes(row, cfg: Config, shard: Shard) -> tuple[int, int]:
    """Return how many elements of a tensor of `rows` this rank keeps, and how many it reads to get them."""
    axis, ranges = held(row, cfg, shard)
    kept = row.size // row.shape[axis] * sum(map(len, ranges))
    return kept, kept if axis == 0 else row.size


def bytes_read(cfg: Config, shard: Shard) -> dict[str, Counter[str]]:
    """Return the bytes of the checkpoint by role: `kept` by this rank, and `touched` to get them.

    A cut across columns reads its whole tensor; every other cut touches only its own rows.
    """
    kept: Counter[str] = Counter()
    touched: Counter[str] = Counter()
    for row in held_tensors(cfg, shard):
        width = DTYPES[row.dtype].itemsize
        mine, passed = sizes(row, cfg, shard)
        kept[row.role] += mine * width
        touched[row.role] += passed * width
    return {"kept": kept, "touched": touched}

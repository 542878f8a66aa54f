"""The CUDA backend on paper: a device that remembers what it was asked to launch, and computes nothing.

    launches(cfg, batch, length, context)    every kernel of one call of the model
    largest_blocks()                         of each kernel, in all released models

Arrays are made with no memory behind them, so that a released model fits on any machine. The verbs are the
backend's own; a launch is checked as on any other device.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import NamedTuple

from refengine.backends.cuda import cuda_backend, kernel
from refengine.backends.cuda.array import DeviceArray
from refengine.backends.cuda.attention import Cache
from refengine.backends.cuda.base import Device
from refengine.backends.cuda.experts import Stacked
from refengine.spec.config import Config
from refengine.spec.model import Model
from refengine.spec.tensors import Group, placed
from tools.cuda.call import trunk
from tools.cuda.compile import BUILDS
from tools.releases import CONFIGS, DENSE

CALLS = (1, 1, 4096), (64, 1, 4096), (1, 40, 0), (1, 4096, 0)  # sequences, new positions, positions before

IN_PLACE = {
    ("relu2", "x"),
    ("causal_conv", "tail"),
    ("causal_conv_update", "tail"),
    ("ssd_step", "S"),
    ("ssd_pass", "S"),
}


class Block(NamedTuple):
    """The resources of a multiprocessor that a launch takes."""

    threads: int
    shared: int  # dynamic bytes


class Launch(NamedTuple):
    """One kernel, or a product of matrices by cuBLAS."""

    file: str
    kernel: str
    block: Block
    build: str
    bytes: int  # of its arrays, twice where it reads and writes one


class PaperDevice(Device):
    """A device without memory: arrays of any size, no values; it notes what is launched."""

    name, arch = "paper", "sm_90"
    shared_limit = 227 << 10
    memory = 1 << 60, 1 << 60

    def __init__(self):
        self.launched: list[Launch] = []

    def allocate(self, nbytes: int):
        """Return memory at address 0."""
        return SimpleNamespace(ptr=0)

    def clear(self, x: DeviceArray) -> None:
        """Do nothing: there are no values."""

    def upload(self, x: DeviceArray, values) -> None:
        """Do nothing: there are no values."""

    def run(self, file, kernel_name, grid, block, args, shared_bytes, defines) -> None:
        """Note the launch, and the bytes of its arrays."""
        build = next(build for build, given in BUILDS.items() if given == defines)
        parameters = kernel.signatures(self.kernels / f"{file}.cu")[kernel_name]
        arrays = [(a, p.name) for a, p in zip(args, parameters, strict=True) if isinstance(a, DeviceArray)]
        moved = sum(a.nbytes * (2 if (kernel_name, name) in IN_PLACE else 1) for a, name in arrays)
        self.launched.append(Launch(file, kernel_name, Block(prod(block), shared_bytes), build, moved))

    def matmul(self, x: DeviceArray, weight: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
        """Note a product by cuBLAS, and return its empty result."""
        if x.shape[1] != weight.shape[1]:
            raise ValueError(f"{x} times {weight}")
        out = self.empty((x.shape[0], weight.shape[0]), x.dtype) if out is None else out
        moved = x.nbytes + weight.nbytes + out.nbytes
        self.launched.append(Launch("cuBLAS", "cuBLAS", Block(0, 0), x.dtype, moved))
        return out


def launches(cfg: Config, batch: int, length: int, context: int, build: str = "bfloat16") -> list[Launch]:
    """Return the launches of one call of the model, from the ids to the logits of each last position."""
    device = PaperDevice()
    dtype, state = {"float16 state": ("bfloat16", "float16")}.get(build, (build, "float32"))
    backend = cuda_backend(dtype, device, state=state)
    model = Model(cfg, placed(trunk(cfg), lambda group: place(group, device, dtype)), backend)
    states = [after(state, batch, context) for state in model.new_states(batch)]
    ids = device.empty((batch, length), "int32")
    device.launched.clear()
    h, _ = model.blocks(model.embed(ids), states)
    model.head(h[:, -1:])
    return device.launched


def after(state, batch: int, context: int):
    """Return a state that has read `context` tokens."""
    return state.copied(context + 1).advanced(context) if isinstance(state, Cache) else state


def largest_blocks() -> dict[tuple[str, str, str], Block]:
    """Return the most threads, and the most shared memory, by file, kernel and build."""
    found: dict[tuple[str, str, str], Block] = {}
    released = [*CONFIGS.values(), *(cfg for cfg, *_ in DENSE.values())]
    for cfg, build, call in product(released, ("float32", "bfloat16", "float16 state"), CALLS):
        one_of_each = replace(cfg, layers="".join(dict.fromkeys(cfg.layers)), mtp_layers="")
        for launch in launches(one_of_each, *call, build):
            key = launch.file, launch.kernel, launch.build
            known = found.get(key, launch.block)
            found[key] = Block(*map(max, known, launch.block))
    return found


def place(group: Group, device: PaperDevice, dtype: str):
    """Return a weight of the right shape: q, k, v below each other, experts in two stacks."""
    kind = "float32" if group.rows[0].precision == "small" else dtype
    shape = group.rows[0].shape
    if group.name == "experts":
        count = len(group.rows) // 2
        return Stacked(*(device.empty((count, *row.shape), kind) for row in group.rows[:2]))
    if len(group.rows) > 1:
        shape = sum(row.shape[0] for row in group.rows), shape[1]
    return device.empty(shape, kind)

"""A device that is this CPU: the calls of backends/cuda/base.py, with kernels run by the runtime in C++.

    EmulatedDevice(seed=0, mode="fast", perturb=False)

mode "fast" runs kernels in this process. "address" (AddressSanitizer and UndefinedBehaviorSanitizer) and
"thread" (ThreadSanitizer) run each launch in a program of its own, which gets a copy of the memory and gives
it back; so neither Python nor pytest knows of the sanitizer. What a kernel does wrong is an EmulationError.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from refengine.backends.cuda import kernel
from refengine.backends.cuda.array import DTYPES, DeviceArray
from refengine.backends.cuda.base import Device
from tools.cuda.compile import SHARED
from tools.cuda.emulator.build import MODES, build

MARGIN = 256  # bytes of poison before and after each allocation; also its alignment
POISON = 0xFF  # as float32, bfloat16 and float16: not a number


class EmulationError(Exception):
    """A sentence on a kernel's forbidden act, then a sanitizer's report, if there is one."""


class Memory:
    """Poisoned bytes between two poisoned margins."""

    def __init__(self, nbytes: int):
        self.whole = np.full(nbytes + 3 * MARGIN, POISON, np.uint8)
        before = MARGIN + -self.whole.ctypes.data % MARGIN
        self.bytes = self.whole[before : before + nbytes]
        self.margins = self.whole[before - MARGIN : before], self.whole[before + nbytes :][:MARGIN]
        self.ptr = self.whole.ctypes.data + before

    def intact(self) -> bool:
        return all((margin == POISON).all() for margin in self.margins)


class EmulatedDevice(Device):
    """`seed` and the launch itself (kernel, sizes, numbers) decide the order of blocks and threads.

    `perturb`: approximate functions are off by a few units in the last place, products are fused with sums,
    and denormal numbers count as 0, all as on a GPU. `kernels`: the directory of the kernel files.
    """

    name = "emulated"

    def __init__(
        self,
        seed: int = 0,
        mode: str = "fast",
        perturb: bool = False,
        arch: str = "sm_80",
        memory: int = 1 << 40,
        kernels: Path = kernel.KERNELS,
    ):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        self.mode, self.perturb, self.arch, self.kernels = mode, perturb, arch, Path(kernels)
        self.shared_limit = SHARED[arch]
        self.seed = seed
        self.memory = memory, memory
        self.recorded: list | None = None  # what a capture has seen so far; None: nothing is captured

    def do(self, function, *args) -> None:
        """Do what a real device puts into its stream: now or, while a graph is captured, at each replay."""
        if self.recorded is None:
            function(*args)
        else:
            self.recorded.append((function, args))

    def allocate(self, nbytes: int) -> Memory:
        return Memory(nbytes)

    def clear(self, x: DeviceArray) -> None:
        self.do(fill, x, 0)

    def write(self, x: DeviceArray, values: np.ndarray) -> None:
        self.not_recording()
        fill(x, values)

    def download(self, x: DeviceArray) -> np.ndarray:
        self.not_recording()
        return host(x).copy()

    def sync(self) -> None:
        """Do nothing: every call is complete when it returns."""

    def matmul(self, x: DeviceArray, weight: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
        out = self.empty((x.shape[0], weight.shape[0]), x.dtype) if out is None else out
        self.do(multiply, x, weight, out)
        return out

    def run(self, file, kernel_name, grid, block, args, shared_bytes, defines) -> None:
        entries = tuple(kernel.launch_bounds(self.kernels / f"{file}.cu").items())
        built = build(self.kernels, file, entries, defines, self.mode, self.perturb)
        sizes = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
        here = run_here if self.mode == "fast" else run_apart
        numbers = [a for a in args if isinstance(a, np.generic)]
        seed = zlib.crc32(repr((self.seed, file, kernel_name, sizes, numbers, defines)).encode())
        self.do(here, built, kernel_name, sizes, shared_bytes, seed, args)

    def capture(self, function) -> Graph:
        """Return the launches of `function`, recorded and not run; values and addresses are fixed."""
        self.recorded = []
        try:
            function()
            return Graph(self.recorded)
        finally:
            self.recorded = None

    def not_recording(self) -> None:
        if self.recorded is not None:
            raise EmulationError("nothing goes from or to the host while a graph is captured")


class Graph:
    """Recorded calls."""

    def __init__(self, calls: list):
        self.calls = calls

    def replay(self) -> None:
        for function, args in self.calls:
            function(*args)


def fill(x: DeviceArray, values) -> None:
    host(x)[...] = values


def multiply(x: DeviceArray, weight: DeviceArray, out: DeviceArray) -> None:
    product = host(x).astype(np.float32) @ host(weight).astype(np.float32).T
    fill(out, product.astype(DTYPES[out.dtype]))


def host(x: DeviceArray) -> np.ndarray:
    """Return the memory of an emulated array as NumPy sees it."""
    whole = x.memory.bytes.view(DTYPES[x.dtype])[x.offset :]
    return np.lib.stride_tricks.as_strided(whole, x.shape, [s * x.itemsize for s in x.strides])


def memories(args) -> list[Memory]:
    """Return the pieces of memory that these arguments point into, each once."""
    return list({id(a.memory): a.memory for a in args if isinstance(a, DeviceArray)}.values())


def run_here(built: Path, kernel_name: str, sizes, shared_bytes: int, seed: int, args) -> None:
    values = [
        np.uint64(a.pointer if a is not None else 0) if a is None or isinstance(a, DeviceArray) else a
        for a in args
    ]
    cells = [np.asarray(value) for value in values]
    pointers = (ctypes.c_void_p * max(1, len(cells)))(*(cell.ctypes.data for cell in cells))
    message = ctypes.create_string_buffer(512)
    door = library(built).cuda_on_cpu_launch
    wrong = door(
        kernel_name.encode(),
        (ctypes.c_uint32 * 6)(*sizes),
        ctypes.c_uint64(shared_bytes),
        ctypes.c_uint64(seed),
        pointers,
        message,
        ctypes.c_uint64(len(message)),
    )
    if wrong:
        raise EmulationError(message.value.decode())
    if not all(memory.intact() for memory in memories(args)):
        raise EmulationError(f"kernel {kernel_name}: something was written outside of an array")


@cache
def library(built: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(built))


def run_apart(built: Path, kernel_name: str, sizes, shared_bytes: int, seed: int, args) -> None:
    buffers = memories(args)
    counts = shared_bytes, seed, len(buffers), len(args)
    request = [struct.pack("64s6I4Q", kernel_name.encode(), *sizes, *counts)]
    for memory in buffers:
        request += [struct.pack("Q", len(memory.bytes)), memory.bytes.tobytes()]
    for a in args:
        if isinstance(a, DeviceArray):
            number = next(i for i, memory in enumerate(buffers) if memory is a.memory)
            request.append(struct.pack("qQ", number, a.offset * a.itemsize))
        else:
            value = b"" if a is None else a.tobytes()
            request.append(struct.pack("q8s", -1, value))
    done = subprocess.run([built], input=b"".join(request), capture_output=True, env=environment())
    if done.returncode:
        raise EmulationError(f"kernel {kernel_name}: {summary(done.stderr.decode(errors='replace'))}")
    length = struct.unpack_from("Q", done.stdout)[0]
    if length:
        raise EmulationError(done.stdout[8 : 8 + length].decode())
    at = 8
    for memory in buffers:
        memory.bytes[:] = np.frombuffer(done.stdout, np.uint8, len(memory.bytes), at)
        at += len(memory.bytes)


@cache
def environment() -> dict[str, str]:
    """Return the options of the sanitizers: the symbolizer, and to stop at the first finding."""
    symbolizer = shutil.which("llvm-symbolizer-19") or "/usr/lib/llvm-19/bin/llvm-symbolizer"
    options = f"external_symbolizer_path={symbolizer}:halt_on_error=1:print_stacktrace=1:detect_leaks=0"
    names = ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS")
    return os.environ | dict.fromkeys(names, options)


def summary(report: str) -> str:
    """Return a sanitizer's finding: its own one-line summary first, then the report."""
    found = re.search(r"^SUMMARY: (.*)$|runtime error: (.*)$", report, re.MULTILINE)
    first = next((part for part in found.groups() if part), "") if found else "it ended without a word"
    return f"{first}\n{report}"

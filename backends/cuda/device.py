"""A CUDA device: the only file that uses CuPy.

All work goes to one stream of its own, in the order of the calls. Kernels are compiled by NVRTC when they are
first launched (CuPy keeps the result on disk); matrices are multiplied by cuBLAS, summed in float32.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from refengine.backends.cuda.array import DTYPES, DeviceArray
from refengine.backends.cuda.base import Device
from refengine.backends.cuda.requirements import (
    check_capability,
    check_driver,
    check_libraries,
    gib,
    imported,
)
from refengine.spec.config import InputError

__all__ = ["CupyDevice", "Device", "DeviceArray"]
STAGE = 32 << 20  # bytes of one of the two pinned buffers that copies from and to the host go through
UNDECLARED = 48 << 10  # bytes of shared memory that a launch may have without asking
CUDA_DTYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType_t
GEMM = dict(compute=68, algorithm=-1)  # CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT


class CupyDevice(Device):
    """The CUDA device number `index`. InputError if there is none that serves.

    pooled  memory is kept for reuse; without that, compute-sanitizer sees where each array ends
    """

    def __init__(self, index: int = 0, pooled: bool = True):
        self.cupy = cupy = imported()
        check_driver(cupy.cuda.runtime)
        check_libraries(cupy)
        count = cupy.cuda.runtime.getDeviceCount()
        if not 0 <= index < count:
            raise InputError(
                f"there is no cuda:{index}: this machine has {count} CUDA device{'s' if count > 1 else ''}"
            )
        self.handle = cupy.cuda.Device(index)
        self.handle.use()
        self.name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        capability = self.handle.compute_capability
        check_capability(self.name, capability)
        self.arch = f"sm_{capability}"
        self.shared_limit = self.handle.attributes["MaxSharedMemoryPerBlockOptin"]
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.pool = cupy.cuda.MemoryPool() if pooled else Unpooled(cupy)
        self.stage = Stage(cupy, self.stream)
        self.modules: dict[tuple, Any] = {}  # by file and defines
        self.functions: dict[tuple, Any] = {}  # by file, kernel and defines
        self.declared: dict[tuple, int] = {}  # dynamic shared memory of each function, in bytes
        self.blas = self.handle.cublas_handle  # made now: it cannot be while a graph is captured
        self.one, self.zero = np.ones((), np.float32), np.zeros((), np.float32)

    @property
    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free (those that the pool keeps for reuse among them), and all bytes."""
        free, total = self.handle.mem_info
        return free + self.pool.free_bytes(), total

    # ---- Memory ----

    def allocate(self, nbytes: int):
        """Return memory of the pool; InputError if the device has too little."""
        try:
            with self.handle, self.stream:
                return self.pool.malloc(max(1, nbytes))
        except self.cupy.cuda.memory.OutOfMemoryError:
            raise InputError(self.too_small(nbytes)) from None

    def clear(self, x: DeviceArray) -> None:
        """Fill a contiguous array with zeros."""
        with self.handle:
            self.cupy.cuda.runtime.memsetAsync(x.pointer, 0, x.nbytes, self.stream.ptr)

    def write(self, x: DeviceArray, values: np.ndarray) -> None:
        """Fill a contiguous array with values of its shape and dtype."""
        with self.handle:
            self.stage.upload(x.pointer, np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def download(self, x: DeviceArray) -> np.ndarray:
        """Return the values of a contiguous array."""
        values = np.empty(x.shape, DTYPES[x.dtype])
        with self.handle:
            self.stage.download(values.reshape(-1).view(np.uint8), x.pointer)
        return values

    def sync(self) -> None:
        """Wait until all that was launched is done."""
        self.stream.synchronize()

    # ---- Kernels ----

    def run(self, file, kernel_name, grid, block, args, shared_bytes, defines) -> None:
        """Start a kernel whose arguments have been checked."""
        key = file, kernel_name, defines
        if key not in self.functions:
            self.functions[key] = function = self.module(file, defines).get_function(kernel_name)
            self.declared[key] = UNDECLARED - function.shared_size_bytes  # the file's own arrays count too
        function = self.functions[key]
        if shared_bytes > self.declared[key]:
            function.max_dynamic_shared_size_bytes = shared_bytes
            self.declared[key] = shared_bytes
        values = tuple(plain(argument) for argument in args)
        with self.handle, self.stream:
            function(three(grid), three(block), values, shared_mem=shared_bytes)

    def module(self, file: str, defines: tuple[str, ...]):
        """Return the compiled file, compiled when a function of it is first launched."""
        if (file, defines) not in self.modules:
            code, options = source(self.kernels, file, defines)
            self.modules[file, defines] = self.cupy.RawModule(code=code, options=options, backend="nvrtc")
        return self.modules[file, defines]

    def matmul(self, x: DeviceArray, weight: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
        """Return x weight': row-major, which to cuBLAS is the column-major weight (transposed) times x."""
        (m, i), o = x.shape, weight.shape[0]
        out = self.empty((m, o), x.dtype) if out is None else out
        x, weight = x.in_rows(), weight.in_rows()
        if not out.size:
            return out
        cublas = self.cupy.cuda.cublas
        with self.handle, self.stream:
            cublas.gemmEx(
                self.blas,
                cublas.CUBLAS_OP_T,
                cublas.CUBLAS_OP_N,
                o,
                m,
                i,
                self.one.ctypes.data,
                weight.pointer,
                CUDA_DTYPES[weight.dtype],
                leading(weight),
                x.pointer,
                CUDA_DTYPES[x.dtype],
                leading(x),
                self.zero.ctypes.data,
                out.pointer,
                CUDA_DTYPES[out.dtype],
                leading(out),
                GEMM["compute"],
                GEMM["algorithm"],
            )
        return out

    # ---- Graphs ----

    def capture(self, function) -> Graph:
        """Return the launches of `function` as a graph, without running them; its replay is one call.

        It may not look at values, nor copy from or to the host. Memory that it asks for comes from a pool
        that the graph keeps, so that nothing else uses it between replays.
        """
        outer, self.pool = self.pool, self.cupy.cuda.MemoryPool()
        try:
            with self.recording():
                function()
            return Graph(self.captured, self.pool, self)
        finally:
            self.pool = outer

    @contextmanager
    def recording(self):
        """Enclose begin_capture and end_capture, which must come even if something fails."""
        with self.handle, self.stream:
            self.stream.begin_capture(self.cupy.cuda.runtime.streamCaptureModeRelaxed)
            self.stage.closed = True
            try:
                yield
            finally:
                self.stage.closed = False
                self.captured = self.stream.end_capture()

    def too_small(self, nbytes: int) -> str:
        """Return the sentence for an array of so many bytes that does not fit."""
        free, total = self.memory
        return (
            f"{self.name} has {gib(free)} of {gib(total)} free, and {gib(nbytes)} more are needed; a smaller "
            f"batch, a shorter context, or a smaller model fits"
        )


class Unpooled:
    """A pool that keeps nothing: memory goes with its last reference. Not for graphs, which use it later."""

    def __init__(self, cupy):
        self.cupy = cupy

    def malloc(self, nbytes: int):
        """Return memory that is freed with its last reference."""
        return self.cupy.cuda.MemoryPointer(self.cupy.cuda.Memory(nbytes), 0)

    def free_bytes(self) -> int:
        """Return 0: nothing is kept for reuse."""
        return 0


class Graph:
    """A captured sequence of launches, with the memory between them."""

    def __init__(self, graph, pool, device):
        self.graph, self.pool, self.device = graph, pool, device

    def replay(self) -> None:
        """Run all captured launches, in order."""
        with self.device.handle:
            self.graph.launch(self.device.stream)


class Stage:
    """Two pinned buffers: while one is being copied to the device, the other is filled."""

    def __init__(self, cupy, stream):
        self.runtime, self.stream, self.closed, self.turn = cupy.cuda.runtime, stream, False, 0
        self.pinned = [cupy.cuda.alloc_pinned_memory(STAGE) for _ in range(2)]
        self.bytes = [np.frombuffer(memory, np.uint8, STAGE) for memory in self.pinned]
        self.free = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        for event in self.free:
            event.record(stream)

    def next(self) -> int:
        """Return the number of a buffer whose last copy is done."""
        if self.closed:
            raise RuntimeError("nothing goes from or to the host while a graph is captured")
        self.turn = 1 - self.turn
        self.free[self.turn].synchronize()
        return self.turn

    def upload(self, pointer: int, values: np.ndarray) -> None:
        """Copy bytes of the host to an address of the device, a buffer at a time."""
        kind = self.runtime.memcpyHostToDevice
        for start in range(0, len(values), STAGE):
            part, i = values[start : start + STAGE], self.next()
            self.bytes[i][: len(part)] = part
            self.runtime.memcpyAsync(pointer + start, self.pinned[i].ptr, len(part), kind, self.stream.ptr)
            self.free[i].record(self.stream)

    def download(self, values: np.ndarray, pointer: int) -> None:
        """Copy bytes from an address of the device to the host, a buffer at a time."""
        kind = self.runtime.memcpyDeviceToHost
        for start in range(0, len(values), STAGE):
            part, i = values[start : start + STAGE], self.next()
            self.runtime.memcpyAsync(self.pinned[i].ptr, pointer + start, len(part), kind, self.stream.ptr)
            self.stream.synchronize()
            part[:] = self.bytes[i][: len(part)]


# ---- Kernels and their arguments ----


def source(kernels: Path, file: str, defines: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the text that NVRTC compiles, and its options.

    CuPy's cache on disk knows a module by its source, not by what that includes; so the source names the
    headers' digest.
    """
    headers = b"".join(path.read_bytes() for path in sorted(kernels.glob("*.cuh")))
    text = (kernels / f"{file}.cu").read_text()
    code = f'// {hashlib.sha256(headers).hexdigest()}\n#line 1 "{file}.cu"\n{text}'
    return code, ("-std=c++17", f"-I{kernels}", *(f"-D{name}" for name in defines))


def plain(argument):
    """Return a kernel's argument with exactly the bytes that it takes: a pointer is 8."""
    if argument is None:
        return np.uint64(0)
    return np.uint64(argument.pointer) if isinstance(argument, DeviceArray) else argument


def three(sizes) -> tuple[int, int, int]:
    """Return the sizes (one, two or three) as three, filled up with 1."""
    x, y, z = [*map(int, sizes), 1, 1][:3]
    return x, y, z


def leading(x: DeviceArray) -> int:
    """Return how many elements lie from one row to the next."""
    return max(1, x.shape[1], x.strides[0] if x.shape[0] > 1 else 0)

"""Device: what a real one and the emulated one share: arrays, checked launches, copies, sums."""

from __future__ import annotations

from math import prod

import numpy as np

from refengine.backends.cuda import kernel
from refengine.backends.cuda.array import DTYPES, DeviceArray, packed_strides

THREADS = 256  # of a block, in kernels that treat each element alike
BLOCKS = 4096  # of such a kernel, at most: a thread takes several elements


class Device:
    """A device. A subclass allocates, fills and reads memory, runs kernels and multiplies matrices."""

    name: str
    arch: str  # "sm_90"
    shared_limit: int  # bytes of shared memory that a block can have
    kernels = kernel.KERNELS

    # ---- What a subclass defines ----

    def allocate(self, nbytes: int):
        """Return memory with a `.ptr`; its contents are undefined."""
        raise NotImplementedError

    def clear(self, x: DeviceArray) -> None:
        """Fill a contiguous array with zeros."""
        raise NotImplementedError

    def write(self, x: DeviceArray, values: np.ndarray) -> None:
        """Fill a contiguous array with values of its shape and dtype."""
        raise NotImplementedError

    def download(self, x: DeviceArray) -> np.ndarray:
        """Return the values of a contiguous array."""
        raise NotImplementedError

    def run(self, file, kernel_name, grid, block, args, shared_bytes, defines) -> None:
        """Start a kernel whose arguments have been checked."""
        raise NotImplementedError

    def matmul(self, x: DeviceArray, weight: DeviceArray, out: DeviceArray | None = None) -> DeviceArray:
        """Return x [m, i] weight' [o, i] -> [m, o], summed in float32; in x's dtype, or in that of `out`."""
        raise NotImplementedError

    # ---- Arrays ----

    def empty(self, shape, dtype: str) -> DeviceArray:
        """Return an array of undefined values."""
        shape = tuple(int(s) for s in shape)
        memory = self.allocate(prod(shape) * DTYPES[dtype].itemsize)
        return DeviceArray(self, memory, 0, shape, packed_strides(shape), dtype)

    def zeros(self, shape, dtype: str) -> DeviceArray:
        """Return an array of zeros."""
        x = self.empty(shape, dtype)
        self.clear(x)
        return x

    def from_host(self, values: np.ndarray) -> DeviceArray:
        """Return an array of the host on this device."""
        values = np.asarray(values)
        dtype = next((name for name, known in DTYPES.items() if known == values.dtype), None)
        if dtype is None:
            raise TypeError(f"an array of {values.dtype} does not go to a device")
        x = self.empty(values.shape, dtype)
        self.upload(x, values)
        return x

    def upload(self, x: DeviceArray, values: np.ndarray) -> None:
        """Begin to fill a contiguous array from the host; what is launched later sees the values."""
        if values.shape != x.shape or values.dtype != DTYPES[x.dtype] or not x.contiguous:
            raise ValueError(f"{values.dtype} {list(values.shape)} does not go to {x}")
        if values.size:
            self.write(x, values)

    def to_host(self, x: DeviceArray) -> np.ndarray:
        """Return the values of an array on the host."""
        if not x.size:
            return np.empty(x.shape, DTYPES[x.dtype])
        return self.download(x.packed())

    # ---- Kernels ----

    def launch(self, file, kernel_name, grid, block, args, shared_bytes=0, defines=()) -> None:
        """Run a kernel of kernels/`file`.cu; the arguments must be those of its source.

        An argument is a DeviceArray, None (a null pointer), np.int32, np.int64, np.uint64 or np.float32.
        """
        args, defines = tuple(args), tuple(defines)
        kernel.check(file, kernel_name, args, defines, self, self.kernels)
        kernel.check_sizes(kernel_name, grid, block, shared_bytes, self.shared_limit)
        self.run(file, kernel_name, grid, block, args, shared_bytes, defines)

    def elementwise(self, file, kernel_name, args, size: int, defines=()) -> None:
        """Launch a kernel in which every thread takes elements first, first + step, ... of `size`."""
        if size:
            blocks = min(BLOCKS, -(-size // THREADS))
            self.launch(file, kernel_name, (blocks,), (THREADS,), args, 0, defines)

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Set target[...] = source[...], of one shape and dtype."""
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(f"{source} cannot be copied to {target}")
        lengths, *strides = joined(source.shape, source.strides, target.strides)
        places = [np.int64(n) for n in (*lengths[1:], *strides[0], *strides[1])]
        args = source, target, np.int64(source.size), *places
        self.elementwise("copy", "copy", args, source.size, word(source))

    def copied(self, x: DeviceArray) -> DeviceArray:
        """Return the same elements side by side in memory of their own."""
        result = self.empty(x.shape, x.dtype)
        self.copy(x, result)
        return result

    def add(self, a: DeviceArray, b: DeviceArray) -> DeviceArray:
        """Return a + b, of one shape and dtype."""
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(f"{a} and {b} cannot be added")
        result = self.empty(a.shape, a.dtype)
        defines = ("REAL_BF16",) if a.dtype == "bfloat16" else ()
        self.elementwise("add", "add", (a.packed(), b.packed(), result, np.int64(a.size)), a.size, defines)
        return result

    def gather(self, x: DeviceArray, rows: list[np.ndarray]) -> DeviceArray:
        """Return x[rows] or x[rows, others], row numbers on the host."""
        x, starts, rest = self.row_starts(x, rows)
        result = self.empty((len(starts), *rest), x.dtype)
        args = x, self.from_host(starts), result, np.int64(result.size), np.int64(max(1, prod(rest)))
        self.elementwise("copy", "gather", args, result.size, word(x))
        return result

    def with_rows(self, x: DeviceArray, rows, values: DeviceArray) -> DeviceArray:
        """Return a copy of x in which x[rows] = values."""
        result, starts, rest = self.row_starts(x.copy(), [np.arange(len(x))[rows]])
        values = values.packed()
        if values.shape != (len(starts), *rest) or values.dtype != x.dtype:
            raise ValueError(f"{values} does not fit {len(starts)} rows of {x}")
        args = values, self.from_host(starts), result, np.int64(values.size), np.int64(max(1, prod(rest)))
        self.elementwise("copy", "scatter", args, values.size, word(x))
        return result

    def row_starts(self, x: DeviceArray, rows: list[np.ndarray]):
        """Return x packed, where each of these rows begins (in elements), and the shape of one."""
        x, rest, starts = x.packed(), x.shape[len(rows) :], np.zeros(1, np.int64)
        for row, length, stride in zip(np.broadcast_arrays(*rows), x.shape, x.strides, strict=False):
            if row.ndim != 1 or (row.size and not -length <= row.min() <= row.max() < length):
                raise IndexError(f"rows {row.tolist()} of an axis of {length}")
            starts = starts + row % max(1, length) * stride
        return x, np.ascontiguousarray(starts, np.int64), rest


def word(x: DeviceArray) -> tuple[str]:
    """Return the define by which copy.cu knows the size of an element."""
    return (f"BYTES_{x.itemsize}",)


def joined(shape, *strides, axes: int = 5):
    """Return the shape and each of the strides with five axes: those that run on as one are joined."""
    kept: list[list[int]] = []
    for length, *steps in reversed([*zip(shape, *strides, strict=True)]):
        if length == 1:
            continue
        if kept and all(step == kept[-1][0] * inner for step, inner in zip(steps, kept[-1][1:], strict=True)):
            kept[-1][0] *= length
        else:
            kept.append([length, *steps])
    if len(kept) > axes:
        raise ValueError(f"an array of the shape {list(shape)} has too many axes to copy")
    kept += [[1] + [0] * len(strides)] * (axes - len(kept))
    return [list(column) for column in zip(*reversed(kept), strict=True)]

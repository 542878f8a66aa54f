"""The backends under test, each in one precision. A new backend is one more line in `BENCHES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from refengine.spec.numerics import wide
from refengine.spec.ops import DEFINITION, REFERENCE, Backend, numpy_backend
from refengine.spec.tensors import placed, table
from tools.cuda.emulator import EmulatedDevice, compiler


@dataclass(frozen=True, repr=False, kw_only=True)
class Bench(Backend):
    """A backend that knows its dtype, so that a test can give it arrays and weigh its errors."""

    dtype: np.dtype

    def __repr__(self) -> str:
        return f"BENCHES[{self.name!r}]()"

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))

    def give(self, *arrays: np.ndarray):
        """Activations, from the host, in the dtype of the computation."""
        given = [self.array(np.asarray(a).astype(self.dtype)) for a in arrays]
        return given if len(given) > 1 else given[0]

    def weights(self, cfg, read, block: str = "layers.0") -> dict[str, Any]:
        """The placed weights of one mixer; `read(name)` is a tensor in the file's dtype."""
        rows = [row for row in table(cfg) if row.block == block and row.key.startswith("mixer.")]
        weights = placed(rows, lambda group: self.place(group, [read(row.name) for row in group.rows]))
        return weights[block]["mixer"]

    def state(self, kind: str, cfg, batch: int, **values):
        """An empty state, or one with these values (of S, say) in it."""
        state = self.new_state(kind, cfg, batch)
        wider = wide(self.dtype)
        held = {key: self.array(v.astype(wider if key == "S" else self.dtype)) for key, v in values.items()}
        return type(state)(**(vars(state) | held)) if held else state


def bench(name: str, backend: Backend, dtype) -> Bench:
    kept = {field.name: getattr(backend, field.name) for field in fields(Backend)}
    return Bench(**kept | {"name": name, "dtype": np.dtype(dtype)})


def numpy_bench(dtype: str, ops=REFERENCE, word: str = "numpy") -> Bench:
    return bench(f"{word}-{dtype}", numpy_backend(dtype, ops=ops), dtype)


def torch_bench(name: str) -> Bench:
    from tests.support.torch_benches import TORCH  # which imports this file

    return TORCH[name]()


def cuda_bench() -> Bench:
    """The CUDA kernels, on the emulator."""
    from refengine.backends.cuda import cuda_backend

    return bench("cuda-float32", cuda_backend("float32", EmulatedDevice()), "float32")


BENCHES: dict[str, Callable[[], Bench]] = {
    "numpy-float32": partial(numpy_bench, "float32"),
    "numpy-float64": partial(numpy_bench, "float64"),
    "definition-float32": partial(numpy_bench, "float32", DEFINITION, "definition"),
    "definition-float64": partial(numpy_bench, "float64", DEFINITION, "definition"),
}
if compiler():
    BENCHES["cuda-float32"] = cuda_bench
if find_spec("torch"):
    for name in ("torch-float32", "torch-float32-plain"):
        BENCHES[name] = partial(torch_bench, name)

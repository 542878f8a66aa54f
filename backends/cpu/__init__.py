"""The CPU backend: the vocabulary of `refengine.spec.ops` in compiled loops over NumPy arrays.

    cpu_backend("bfloat16", threads=2) -> refengine.spec.ops.Backend

    verbs      every verb, one call each          program    the addresses of a whole model, for steps
    steps      a decoding step in one call        state      states of layers
    weights    from the memory map, not copied    native     the library: found, or compiled at first use
    interface  what Python and C++ both declare   arrays     addresses of NumPy's and PyTorch's arrays
    memory     buffers of results, for reuse

Weights are float32, float16, bfloat16 or packed, as the file has them; everything else is float32. Few rows
beside packed weights are integers with a scale for a block: of 24 bits, or 16 if the dtype is not float32.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from refengine.backends.cpu import native
from refengine.backends.cpu.state import new_state
from refengine.backends.cpu.steps import Steps
from refengine.backends.cpu.verbs import Verbs
from refengine.backends.cpu.weights import place
from refengine.spec.config import InputError
from refengine.spec.numerics import KV_DTYPES, Stored
from refengine.spec.ops import Backend

DTYPES = ("float32", "bfloat16", "float16")


def cpu_backend(
    dtype: str = "float32",
    threads: int = 1,
    steady: bool = False,
    kv: str | None = None,
    ssm: str | None = None,
) -> Backend:
    """Return a backend with weights in `dtype` or narrower; raise InputError if there are no compiled loops.

    threads  that a call may use
    steady   no logit depends on how many rows are computed beside it, nor on where a prompt is cut, if that
             is at multiples of the chunk: sums go in one order
    kv       dtype of keys and values in the cache: float32, bfloat16 or fp8; None: bfloat16 where `dtype` is
    ssm      dtype of S: float32, or float16, which is rounded at random; None: float32
    """
    if dtype not in DTYPES:
        raise InputError(f"the cpu backend computes in {', '.join(DTYPES)}, not in {dtype}")
    built = native.load()
    if built is None:
        raise InputError("the cpu backend needs a C++ compiler; use --backend numpy")
    stored = Stored(KV_DTYPES[kv or ("bfloat16" if dtype == "bfloat16" else "float32")])
    verbs = Verbs(built, threads, steady, planes=3 if dtype == "float32" else 2)
    steps = Steps(built, verbs.run)
    return Backend(
        name="cpu",
        ops=verbs.ops(),
        place=partial(place, dtype=dtype),
        new_state=partial(new_state, stored=stored, half=ssm == "float16"),
        array=np.asarray,
        fetch=np.asarray,
        step=steps,
        verify=steps.verify,
        predict=steps.predict,
        step_of_ranks=Steps(built, verbs.run, alone=False),
        packed=True,
    )

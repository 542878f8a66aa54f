"""Chapter 12. Operations: the functions of which the model is composed, and their definitions in NumPy.

`Ops` is a set of operations ("verbs"), each as large as a published fused kernel, so that a backend can
use such kernels. A backend is a set of its own functions under the same names. `DEFINITION` binds every
operation to its clearest form; `REFERENCE` replaces the scan, the attention and the experts by the
theorems of their chapters, and the products by those that widen a large matrix in strips of rows; it is
the NumPy backend. Between operations the model uses only +, indexing and .reshape, which every array
library has, and reads no value on the host.

Arguments come as data, weights, state, constants; results as the value, then the next state. `lengths[b]` is
the number of real positions of each row of the batch, or None when all are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np

from refengine.spec import moe
from refengine.spec.arrays import DTYPES, Array, Float, Int, Weight, widen
from refengine.spec.attention import attention, attention_in_blocks
from refengine.spec.config import Config
from refengine.spec.conv import causal_conv
from refengine.spec.norm import gated_rms_norm, rms_norm
from refengine.spec.numerics import relu2, wide
from refengine.spec.scan import ssd_scan, ssd_scan_chunked
from refengine.spec.state import new_state
from refengine.spec.tensors import Group

STRIP = 2**22  # elements of a matrix that are widened at once: 16 MiB in float32


@dataclass(frozen=True)
class Ops:
    """The operations. The backend makes weights, states and routings, and only its operations read them."""

    embed: Callable  # (ids [b l], table) -> x [b l d]
    linear: Callable  # (x [.. i], weight [o i]) -> [.. o]
    linear_pair: Callable  # (x [.. i], y [.. i], weight [o 2i]) -> [.. o]: weight times [x, y] end to end
    rms_norm: Callable  # (x [b l d], delta [b l d] or None, weight [d], eps) -> norm(x + delta), x + delta
    causal_conv: Callable  # (x [b l c], weight [c 1 k], bias [c], tail, lengths) -> y [b l c], tail
    # (x b l h p, dt b l h, A_log, B b l g n, C, D, dt_bias, S, lengths, dt_limit, chunk) -> y, S
    ssd_scan: Callable
    gated_rms_norm: Callable  # (y [b l c], z [b l c], weight [c], eps, groups, mean=...) -> [b l c]
    attention: Callable  # (q [b l h e], k [b l kv e], v [b l kv e], cache, lengths) -> y [b l h e], cache
    route: Callable  # (hidden [b l d], gate [E d], bias [E], cfg) -> routing
    experts: Callable  # (u [b l x], experts, routing, first=0) -> [b l x]: experts first, first + 1, ...
    mlp: Callable  # (hidden [b l d], up [f d], down [d f]) -> [b l d]
    logits: Callable  # (hidden [.. d], lm_head [v d]) -> [.. v], float32 or wider
    all_reduce: Callable  # (x, layer letter) -> the sum over the ranks that share such layers

    def __iter__(self):
        return iter((f.name, getattr(self, f.name)) for f in fields(self))


@dataclass(frozen=True)
class Backend:
    """The operations of one array library, and functions that move values to it and from it."""

    name: str
    ops: Ops
    place: Callable[[Group, list], Any]  # a group's tensors in the file's dtype, or packed -> a weight
    new_state: Callable[[str, Config, int], Any]  # layer letter, config, batch -> an empty state (or None)
    array: Callable[[Array], Any]  # host -> here: token ids, row lengths, hidden states
    fetch: Callable[[Any], Array]  # here -> host: logits, hidden states
    # A whole decoding step in one compiled or recorded call, where there is one:
    step: Callable | None = None  # (model, ids [b], states) -> logits [b v] on the host, next states
    # The same for tensor-parallel ranks: it calls the embed, all_reduce and logits of the model's ops.
    step_of_ranks: Callable | None = None
    # A recorded call of several positions (chapter 9), where there is one: (model, tokens of each row,
    # states) -> logits [l v] and hidden states [l d] of each row on the host, and its record; None if it
    # cannot serve them. record(states, counts [b]) -> states after the first counts[b] positions.
    verify: Callable | None = None
    # The layers and the norm of the prediction head (chapter 15) and the output layer: (model, v [rows d],
    # lengths [b] of the rows, states, whether logits are wanted) -> o [b 1 d] and logits [b v] at the last
    # position of each row, next states; None if it cannot serve them.
    predict: Callable | None = None
    packed: bool = False  # whether `place` takes packed weights; else they are dequantized to bfloat16 first


def embed(ids: Int[Array, "*b"], table: Weight, dtype=np.float32) -> Float[Array, "*b d"]:
    """Return rows of the table, not scaled; the dtype of the computation starts here."""
    return widen(table[ids], dtype)


def linear(x: Float[Array, "*b i"], weight: Weight | tuple) -> Float[Array, "*b o"]:
    """Return x weight'. A weight may be a tuple of matrices, one below the other (q | k | v)."""
    if isinstance(weight, tuple):
        return np.concatenate([linear(x, part) for part in weight], axis=-1)
    return x @ widen(weight, x.dtype).T


def linear_in_strips(
    x: Float[Array, "*b i"], weight: Weight | tuple, strip: int = STRIP
) -> Float[Array, "*b o"]:
    """Return the same product (the theorem); at most `strip` elements (or one row) are widened at once."""
    if isinstance(weight, tuple):
        return np.concatenate([linear_in_strips(x, part, strip) for part in weight], axis=-1)
    rows, columns = weight.shape
    step = max(1, strip // max(1, columns))
    if step >= rows or (isinstance(weight, np.ndarray) and weight.dtype == x.dtype):
        return linear(x, weight)
    y = np.empty((*x.shape[:-1], rows), x.dtype)
    for first in range(0, rows, step):
        y[..., first : first + step] = linear(x, weight[first : first + step])
    return y


def linear_pair(
    x: Float[Array, "*b i"], y: Float[Array, "*b i"], weight: Weight, product: Callable = linear
) -> Float[Array, "*b o"]:
    """Return [x, y] weight': one product for two inputs end to end."""
    return product(np.concatenate([x, y], axis=-1), weight)


def logits(hidden: Float[Array, "*b d"], lm_head: Weight, product: Callable = linear) -> Float[Array, "*b v"]:
    """Return a number for each token of the vocabulary, float32 or wider."""
    return product(hidden, lm_head).astype(wide(hidden.dtype), copy=False)


def mlp_in_strips(h: Float[Array, "*b d"], up: Weight, down: Weight) -> Float[Array, "*b d"]:
    """Return what moe.mlp returns (the theorem); both matrices are widened in strips of rows."""
    return linear_in_strips(relu2(linear_in_strips(h, up)), down)


def recurrence(x, dt, A_log, B, C, D, dt_bias, S, lengths, dt_limit, chunk):
    """Return what ssd_scan returns: the definition of the scan has no chunks."""
    return ssd_scan(x, dt, A_log, B, C, D, dt_bias, S, lengths, dt_limit)


DEFINITION = Ops(
    embed=embed, linear=linear, linear_pair=linear_pair, rms_norm=rms_norm, causal_conv=causal_conv,
    ssd_scan=recurrence, gated_rms_norm=gated_rms_norm, attention=attention, route=moe.route,
    experts=moe.experts, mlp=moe.mlp, logits=logits,
    all_reduce=lambda x, kind: x,
)  # fmt: skip
REFERENCE = replace(
    DEFINITION, ssd_scan=ssd_scan_chunked, attention=attention_in_blocks, experts=moe.experts_grouped,
    linear=linear_in_strips, linear_pair=partial(linear_pair, product=linear_in_strips),
    logits=partial(logits, product=linear_in_strips), mlp=mlp_in_strips,
)  # fmt: skip


def placed_by(backend: Backend, group: Group, values: list) -> Any:
    """Return the weight of a group, as the backend places it."""
    if not backend.packed:
        values = [v if isinstance(v, np.ndarray) else v.dequantize(DTYPES["BF16"]) for v in values]
    return backend.place(group, values)


def place(group: Group, values: list, dtype, resident: bool) -> Any:
    """Return a NumPy weight: the matrix itself, (q, k, v), or [(up, down), ...] of the experts.

    `resident`: widened once, now. Otherwise matrices stay as they are in the file, perhaps in a memory map,
    and are widened each time they are used; packed ones always. Small tensors are always widened to float32
    or wider.
    """
    packed = any(not isinstance(value, np.ndarray) for value in values)
    resident = resident and not packed
    if resident or group.rows[0].precision == "small":
        values = [widen(value, wide(dtype)) for value in values]
    if group.name == "experts":
        return list(zip(values[::2], values[1::2], strict=True))
    return values[0] if len(values) == 1 else np.concatenate(values) if resident else tuple(values)


def numpy_backend(
    dtype=np.float32,
    resident: bool = True,
    ops: Ops = REFERENCE,
    kv: str | None = None,
    ssm: str | None = None,
) -> Backend:
    """Return the spec as a backend, computing in float32 or float64; kv, ssm: see state.new_state."""
    return Backend(
        name="numpy",
        ops=replace(ops, embed=partial(embed, dtype=np.dtype(dtype))),
        place=partial(place, dtype=np.dtype(dtype), resident=resident),
        new_state=partial(new_state, dtype=np.dtype(dtype), kv=kv, ssm=ssm),
        array=np.asarray,
        fetch=np.asarray,
        packed=True,
    )

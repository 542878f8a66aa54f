"""Calibration: the largest magnitudes that the inputs of matrices, and keys and values, take on a text.

The scales of inputs and of an 8-bit cache follow from them, as in the max calibration of modelopt: one
number for all experts of a layer, for up and for down, so that experts without a token have one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import numpy as np

from refengine.backend import fits
from refengine.checkpoint import Checkpoint
from refengine.progress import progress
from refengine.quantize.evaluate import PIECE, pieces
from refengine.quantize.texts import TEXTS
from refengine.spec.arrays import split, widen
from refengine.spec.config import InputError
from refengine.spec.model import Model
from refengine.spec.numerics import relu2
from refengine.spec.ops import Backend, numpy_backend
from refengine.spec.tensors import Group, Tensor

CACHE = {"k_proj.weight": "k_proj.k_scale", "v_proj.weight": "v_proj.v_scale"}  # the tensors of a cache


def scale_of_cache(row: Tensor) -> str | None:
    """Return the name of the scale that belongs to the keys or values which a matrix makes, or None."""
    key = row.key.removeprefix("mixer.")
    return row.name.removesuffix(key) + CACHE[key] if key in CACHE else None


def calibrate(source: Checkpoint, texts: Sequence[str] = TEXTS, piece: int = PIECE) -> dict[str, float]:
    """Return largest magnitudes: of each matrix's input, by its name; of keys and values, by their scale's.

    The trunk reads the first MOST tokens in pieces of at most `piece`. InputError for a model without a
    tokenizer, and for an empty text.
    """
    from refengine.text.ids_only import tokenizer_of

    tokenizer = tokenizer_of(source.directory, source.config)
    cut = pieces([tokenizer.encode(text) for text in texts], piece)
    if not cut:
        raise InputError("the text for calibration is empty")
    backend, found = recording(numpy_backend(np.float32, resident=fits(source.config, "float32")))
    model = Model.build(source.config, source.read, backend)
    with progress("calibrating", sum(map(len, cut)), "token") as bar:
        for ids in cut:
            h, _ = model.blocks(model.embed(np.array([ids])), model.new_states(1))
            model.head(h)
            bar.update(len(ids))
    return found


def recording(backend: Backend) -> tuple[Backend, dict[str, float]]:
    """Return a NumPy backend that computes the same, and the dict in which it keeps largest magnitudes."""
    found: dict[str, float] = {}
    groups: dict[int, Group] = {}  # by the identity of the weight
    ops = backend.ops

    def see(names: list[str], x: np.ndarray) -> None:
        largest = float(np.abs(x).max(initial=0))
        if not isfinite(largest):
            raise InputError(f"calibration failed: {names[0]} meets a number that is not finite")
        found.update({name: max(largest, found.get(name, 0.0)) for name in names})

    def names(weight: Any) -> list[str]:
        return [row.name for row in groups[id(weight)].rows]

    def place(group: Group, values: list) -> Any:
        weight = backend.place(group, values)
        groups[id(weight)] = group
        return weight

    def linear(x, weight):
        see(names(weight), x)
        y = ops.linear(x, weight)
        rows = groups[id(weight)].rows
        if any(scale_of_cache(row) for row in rows):
            for row, part in zip(rows, split(y, [row.shape[0] for row in rows]), strict=True):
                if (name := scale_of_cache(row)) is not None:
                    see([name], part)
        return y

    def logits(hidden, lm_head):
        see(names(lm_head), hidden)
        return ops.logits(hidden, lm_head)

    def route(h, gate, bias, cfg):
        see(names(gate), h)
        return ops.route(h, gate, bias, cfg)

    def mlp(h, up, down):
        see(names(up), h)
        inner = relu2(ops.linear(h, up))
        see(names(down), inner)
        return ops.linear(inner, down)

    def experts(u, matrices, routing, first=0):
        members = names(matrices)
        see(members[::2], u)
        tokens = u.reshape(-1, u.shape[-1])
        chosen = routing.expert.reshape(len(tokens), -1)
        for e in np.unique(chosen):
            reached = tokens[(chosen == e).any(axis=1)]
            see(members[1::2], relu2(reached @ widen(matrices[e - first][0], u.dtype).T))
        return ops.experts(u, matrices, routing, first)

    verbs = replace(ops, linear=linear, logits=logits, route=route, mlp=mlp, experts=experts)
    return replace(backend, ops=verbs, place=place), found

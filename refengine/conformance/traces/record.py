"""Recording a trace of a model on any backend: prompts side by side, in pieces, and steps of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from refengine.conformance.traces import Trace, packed
from refengine.conformance.traces.watch import On, watched
from refengine.spec import mtp
from refengine.spec.model import Model

FLOATS = ("float64", "float32", "float16", "bfloat16")


class Recorder:
    """Collects the results of verbs, by name: a list with an array for each call."""

    def __init__(self, model: Model):
        self.cfg, self.fetch = model.cfg, model.backend.fetch
        self.parts: dict[str, list[np.ndarray]] = {}
        self.last = ""  # the layer whose output the next norm sees
        self.head, self.calls = False, 0

    def keep(self, name: str, value: Any) -> None:
        """Store a copy of a value on the host, the last of a call: a later verb may overwrite it."""
        parts = self.parts.setdefault(name, [])
        del parts[self.calls - 1 :]
        parts.append(np.array(self.fetch(value)))

    def __call__(self, block: str, step: str, right, args) -> Any:
        """Run a verb and store what it returns."""
        self.calls += step == "embeddings"
        result = right(*args)
        if step == "all_reduce":
            return result
        if step in ("norm", "norm_f", "final_layernorm"):
            h, x = result
            if args[1] is not None:
                self.keep(f"{self.last}.output", x)
            if step == "norm":
                self.keep(f"{block}.input", x)
            name = f"{block}.norm" if step == "norm" else "mtp.final_hidden" if self.head else "final_hidden"
            self.keep(name, h)
            self.last = block
        elif step == "router":
            for key in ("experts", "weights"):
                a = getattr(result, key.removesuffix("s"))
                self.keep(f"{block}.router.{key}", a)
        elif step in ("embeddings", "logits", "enorm", "hnorm", "eh_proj"):
            value = result[0] if isinstance(result, tuple) else result
            self.keep(f"mtp.{step}" if self.head else step, value)
        else:
            value = result[0] if step in ("conv", "scan", "attention") else result
            self.keep(f"{block}.{step}", value)
        return result


def record(
    model: Model,
    prompts: Sequence[Sequence[int]],
    cut: int | None = None,
    steps: int = 0,
    plant: Sequence[On] = (),
    **header,
) -> Trace:
    """Return the trace of prompts (token ids) read side by side, and of `steps` likeliest tokens after them.

    cut: most positions of a call; None: a prompt is read in one. plant: calls through which every verb goes
    (`watch.On`), to change what it computes. header: `engine`, `fingerprint`, ... of the Trace.
    """
    recorder = Recorder(model)
    seen = watched(model, [*plant, recorder])
    here, rows = model.backend, [list(ids) for ids in prompts]
    states, calls, hidden = seen.new_states(len(rows)), [], []
    at, longest = 0, max(map(len, rows))
    last = np.zeros((len(rows), model.cfg.vocab_size), np.float32)
    while at < longest:
        width = min(cut or longest, longest - at)
        part = [row[at : at + width] for row in rows]
        states, h, logits = _call(seen, part, states)
        calls.append([len(ids) for ids in part])
        hidden.append(h)
        for i, ids in enumerate(part):
            if ids:
                last[i] = logits[i, len(ids) - 1]
        at += width
    for _ in range(steps):
        new = [[int(token)] for token in last.argmax(-1)]
        rows = [row + token for row, token in zip(rows, new, strict=True)]
        states, h, logits = _call(seen, new, states)
        calls.append([1] * len(rows))
        hidden.append(h)
        last = logits[:, 0].astype(np.float32)
    arrays = {name: np.concatenate(parts, axis=1) for name, parts in recorder.parts.items()}
    for i, state in enumerate(states):
        if hasattr(state, "S"):
            arrays[f"layers.{i}.S"] = np.array(here.fetch(state.S))
            arrays[f"layers.{i}.tail"] = np.array(here.fetch(state.tail))
    if model.cfg.mtp_layers and min(map(len, rows)) > 1:
        recorder.parts, recorder.head, recorder.calls = {}, True, 0
        stream = packed(arrays[f"layers.{len(model.cfg.layers) - 1}.output"], calls)
        _head(seen, rows, packed(np.concatenate(hidden, axis=1), calls), stream, plant)
        arrays |= {name: parts[0] for name, parts in recorder.parts.items()}
    dtype = coarsest(arrays)
    return Trace("the trace", rows, calls, dtype, arrays, **header)


def _call(model: Model, rows: list[list[int]], states: list):
    """Read some tokens of each row; return the states, the hidden states and the logits on the host."""
    here, counts = model.backend, np.array([len(ids) for ids in rows])
    ids = np.zeros((len(rows), counts.max()), np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    lengths = None if (counts == counts.max()).all() else here.array(counts)
    h, states = model.blocks(model.embed(here.array(ids)), states, lengths)
    logits = here.fetch(model.head(h))
    return states, np.array(here.fetch(h)), logits


def _head(model: Model, rows: list[list[int]], hidden, stream, plant: Sequence[On]) -> None:
    """Run the prediction head over all positions but the last of each row."""
    here, counts = model.backend, np.array([len(ids) - 1 for ids in rows])
    ids, after = (np.zeros((len(rows), counts.max()), np.int64) for _ in range(2))
    for i, tokens in enumerate(rows):
        ids[i, : counts[i]], after[i, : counts[i]] = tokens[:-1], tokens[1:]
    h = hidden[:, : counts.max()]
    for on in plant:
        after = on("mtp", "next_ids", lambda ids, after: after, (ids, after))
        h = on("mtp", "hidden", lambda stream, h: h, (stream[:, : counts.max()], h))
    lengths = None if (counts == counts.max()).all() else here.array(counts)
    states = mtp.new_states(model, len(rows))
    o, _ = mtp.predict(model, here.array(h), here.array(after), states, lengths)
    model.head(o)


def coarsest(arrays: dict[str, np.ndarray]) -> str:
    """Return the name of the float dtype with the largest rounding among the arrays."""
    found = {a.dtype.name for a in arrays.values()} & set(FLOATS)
    return max(found, key=lambda name: float(ml_dtypes.finfo(name).eps))

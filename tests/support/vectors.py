"""Recorded vectors: what they hold, and how a backend replays them. Written only by record_vectors.py.

A file is vectors/<op or layer>/<case>.npz: `config` (JSON text), `in.*`, `out.*`, and the weights under their
names in a checkpoint. The line of manifest.toml says where it came from and why it exists.
"""

from __future__ import annotations

import json
import tomllib
from functools import cached_property
from pathlib import Path

import numpy as np

from refengine.conformance.cases import agree, terms
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config
from refengine.spec.mixers import MIXERS
from refengine.spec.model import Model
from refengine.spec.tensors import table

ROOT = Path(__file__).resolve().parents[1] / "vectors"
MANIFEST = tomllib.loads((ROOT / "manifest.toml").read_text())["vectors"] if ROOT.exists() else {}
LAYERS = {"mamba2": "M", "attention": "*", "experts": "E", "mlp": "-"}


class Vector:
    """One recording."""

    def __init__(self, name: str):
        self.name, self.kind = name, name.split("/")[0]
        with np.load(ROOT / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.cfg = Config.from_hf(json.loads(str(self.arrays.pop("config"))))

    @cached_property
    def rows(self) -> dict:
        return {row.name: row for row in table(self.cfg)}

    def read(self, name: str) -> np.ndarray:
        """A weight in the dtype of a released file, where the recorded values are exact; 0 if not needed."""
        row = self.rows[name]
        return self.arrays.get(name, np.zeros(row.shape)).astype(DTYPES[row.dtype])

    def part(self, which: str) -> dict[str, np.ndarray]:
        return {key.split(".", 1)[1]: a for key, a in self.arrays.items() if key.startswith(which + ".")}


def replay(vector: Vector, backend) -> float:
    """The worst error of what the backend answers; AssertionError if it is more than float32 rounding."""
    given, expected = vector.part("in"), vector.part("out")
    answers = REPLAY[vector.kind](vector, backend, given)
    assert answers.keys() == expected.keys()
    length = next(iter(given.values())).shape[1]
    size = terms(vector.cfg, length)
    return max(
        agree(answers[key], a, np.float32, size, f"{vector.name}, {key}") for key, a in expected.items()
    )


def whole(vector, backend, given):
    """Logits of a whole model: the prompt in one call, then the same one token at a time."""
    m, ids = Model.build(vector.cfg, vector.read, backend), given["ids"]
    h, _ = m.blocks(m.embed(backend.array(ids)), m.new_states(len(ids)))
    answers, states, one_by_one = {"logits": backend.fetch(m.head(h))}, m.new_states(len(ids)), []
    for i in range(ids.shape[1]):
        h, states = m.blocks(m.embed(backend.array(ids[:, i : i + 1])), states)
        one_by_one.append(backend.fetch(m.head(h)))
    return answers | {"one_by_one": np.concatenate(one_by_one, axis=1)}


def layer(vector, backend, given):
    """One mixer, without its norm and residual: what it adds to the stream."""
    kind, h = LAYERS[vector.kind], given["h"]
    state = backend.new_state(kind, vector.cfg, len(h))
    w = backend.weights(vector.cfg, vector.read)
    y, state = MIXERS[kind](backend.give(h), w, vector.cfg, state, None, backend.ops)
    answers = {"y": backend.fetch(y)}
    return answers | ({"S": backend.fetch(state.S), "tail": backend.fetch(state.tail)} if kind == "M" else {})


def ssd_scan(vector, backend, given):
    w, c = backend.weights(vector.cfg, vector.read), vector.cfg
    S = backend.state("M", c, len(given["x"]), S=given["S"]).S
    x, dt, B, C = backend.give(*(given[key] for key in ("x", "dt", "B", "C")))
    limit = tuple(given["limit"][0].tolist())
    y, S = backend.ops.ssd_scan(x, dt, w["A_log"], B, C, w["D"], w["dt_bias"], S, None, limit, c.chunk_size)
    return {"y": backend.fetch(y), "S": backend.fetch(S)}


def causal_conv(vector, backend, given):
    w, (x, tail) = backend.weights(vector.cfg, vector.read), backend.give(given["x"], given["tail"])
    y, tail = backend.ops.causal_conv(x, w["conv1d.weight"], w["conv1d.bias"], tail, None)
    return {"y": backend.fetch(y), "tail": backend.fetch(tail)}


def gated_rms_norm(vector, backend, given):
    w, c = backend.weights(vector.cfg, vector.read)["norm.weight"], vector.cfg
    y, z = backend.give(given["y"], given["z"])
    return {"u": backend.fetch(backend.ops.gated_rms_norm(y, z, w, c.layer_norm_epsilon, c.n_groups))}


def route(vector, backend, given):
    """As a row of weights over all experts, most of them 0: the order among the chosen has no meaning."""
    w, h = backend.weights(vector.cfg, vector.read), backend.give(given["h"])
    routing = backend.ops.route(h, w["gate.weight"], w["gate.e_score_correction_bias"], vector.cfg)
    at = given["h"].shape[:2]
    expert, weight = (backend.fetch(a).reshape(*at, -1) for a in (routing.expert, routing.weight))
    rows = np.zeros((*at, vector.cfg.n_routed_experts))
    np.put_along_axis(rows, expert.astype(np.int64), weight, axis=-1)
    return {"weights": rows}


REPLAY = {
    "model": whole,
    **dict.fromkeys(LAYERS, layer),
    "ssd_scan": ssd_scan,
    "causal_conv": causal_conv,
    "gated_rms_norm": gated_rms_norm,
    "route": route,
}

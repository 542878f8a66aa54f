"""Computing the outputs of a vector with a backend: for each operation, which verbs read which arrays.

The right outputs of a vector are what these functions return for the definition in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refengine.conformance.vectors import Vector, as_dtype
from refengine.spec import mtp
from refengine.spec import state as states_of
from refengine.spec.mixers import MIXERS
from refengine.spec.model import Model
from refengine.spec.numerics import wide
from refengine.spec.ops import Backend
from refengine.spec.state import Cache
from refengine.spec.tensors import placed, table

MIXER_OF = {"mamba2 mixer": "M", "attention mixer": "*", "experts mixer": "E", "mlp mixer": "-"}


@dataclass(frozen=True)
class Engine:
    """A backend, the dtype of its activations, and the case that it computes."""

    backend: Backend
    dtype: np.dtype
    vector: Vector

    def give(self, *names: str) -> list[Any]:
        """Return inputs of the case as activations of the backend."""
        return [self.array(self.vector.arrays["in." + name]) for name in names]

    def array(self, a: np.ndarray):
        """Return an array of the host as an activation of the backend; whole numbers stay what they are."""
        return self.backend.array(a if a.dtype.kind == "i" else np.asarray(a).astype(self.dtype))

    def host(self, name: str) -> np.ndarray | None:
        """Return an input as it is in the case; None where there is none of that name."""
        return self.vector.arrays.get("in." + name)

    def lengths(self):
        """Return the input `lengths` here; None where all positions are real."""
        n = self.host("lengths")
        return None if n is None else self.backend.array(n)

    def fetch(self, a) -> np.ndarray:
        """Return an array of the backend on the host; bfloat16 as float32."""
        out = np.asarray(self.backend.fetch(a))
        if np.iscomplexobj(out):
            raise AssertionError(f"{out.dtype}, where real numbers are due")
        return out if out.dtype.kind in "fiu" else out.astype(np.float32)

    def weights(self) -> dict[str, dict[str, Any]]:
        """Return those weights of the case that are there, placed, by block and group."""
        v = self.vector
        rows = [row for row in table(v.cfg) if row.name in v.arrays]
        return placed(rows, lambda group: self.backend.place(group, [v.read(row.name) for row in group.rows]))

    def mixer(self) -> dict[str, Any]:
        """Return the weights of the first layer's mixer."""
        return self.weights()["layers.0"]["mixer"]

    def recurrent(self, batch: int, **values: np.ndarray):
        """Return a Mamba layer's state that holds `tail` or S of the case."""
        state = self.backend.new_state("M", self.vector.cfg, batch)
        held = {
            key: self.backend.array(np.asarray(a).astype(wide(self.dtype) if key == "S" else self.dtype))
            for key, a in values.items()
        }
        return type(state)(**(vars(state) | held)) if held else state

    def model(self) -> Model:
        """Return the model of the case, placed by the backend."""
        return Model.build(self.vector.cfg, self.vector.read, self.backend)

    def states(self, states: list, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Return the arrays of states by names such as "states.0.S"; a cache of another form is left out.

        Keys and values are b t kv e, zero beyond the length of each row.
        """
        out: dict[str, np.ndarray] = {}
        for i, state in enumerate(states):
            if hasattr(state, "S"):
                out |= {f"states.{i}.{key}": self.fetch(getattr(state, key)) for key in ("tail", "S")}
            elif isinstance(state, Cache):
                real = (np.arange(lengths.max()) < lengths[:, None])[..., None, None]
                for key, a in zip("kv", state.upto(int(lengths.max())), strict=True):
                    out[f"states.{i}.{key}"] = np.where(real, a, 0)
        return out


def replay(vector: Vector, backend: Backend, dtype="float32") -> dict[str, np.ndarray]:
    """Return what a backend, whose activations are of `dtype`, answers: arrays by the names of outputs."""
    return REPLAY[vector.operation](Engine(backend, as_dtype(dtype), vector))


def embed(e: Engine) -> dict:
    """Return x b l d of ids b l."""
    ids = e.backend.array(e.vector.arrays["in.ids"])
    return {"x": e.fetch(e.backend.ops.embed(ids, e.weights()[""]["embeddings.weight"]))}


def linear(e: Engine) -> dict:
    """Return y b l o of x b l i."""
    (x,) = e.give("x")
    return {"y": e.fetch(e.backend.ops.linear(x, e.mixer()["in_proj.weight"]))}


def linear_pair(e: Engine) -> dict:
    """Return v b l d of the two inputs of the prediction head, b l d each."""
    x, y = e.give("x", "y")
    weight = e.weights()["mtp.layers.0"]["eh_proj.weight"]
    return {"v": e.fetch(e.backend.ops.linear_pair(x, y, weight))}


def rms_norm(e: Engine) -> dict:
    """Return the normalised stream and the stream, b l d, of a stream and what is added to it."""
    x, delta = e.give("x", "delta")
    weight = e.weights()["layers.0"]["norm.weight"]
    y, x = e.backend.ops.rms_norm(x, delta, weight, e.vector.cfg.layer_norm_epsilon)
    return {"y": e.fetch(y), "x": e.fetch(x)}


def causal_conv(e: Engine) -> dict:
    """Return y b l c and the next tail b t c."""
    x, tail = e.give("x", "tail")
    w = e.mixer()
    y, tail = e.backend.ops.causal_conv(x, w["conv1d.weight"], w["conv1d.bias"], tail, e.lengths())
    return {"y": e.fetch(y), "tail": e.fetch(tail)}


def ssd_scan(e: Engine) -> dict:
    """Return y b l h p and the next S b h p n."""
    w, c = e.mixer(), e.vector.cfg
    S = e.recurrent(len(e.vector.arrays["in.S"]), S=e.vector.arrays["in.S"]).S
    x, dt, B, C = e.give("x", "dt", "B", "C")
    low, high = e.vector.constants["dt_limit"]  # null: no bound
    limit = (float(low), math.inf if high is None else float(high))
    y, S = e.backend.ops.ssd_scan(
        x, dt, w["A_log"], B, C, w["D"], w["dt_bias"], S, e.lengths(), limit, c.chunk_size
    )
    return {"y": e.fetch(y), "S": e.fetch(S)}


def gated_rms_norm(e: Engine) -> dict:
    """Return u b l c of y and the gate z."""
    y, z = e.give("y", "z")
    c = e.vector.cfg
    weight = e.mixer()["norm.weight"]
    return {"u": e.fetch(e.backend.ops.gated_rms_norm(y, z, weight, c.layer_norm_epsilon, c.n_groups))}


def attention(e: Engine) -> dict:
    """Return y b l h e, after keys and values that were read before."""
    before, (q, k, v) = e.give("k_before", "v_before"), e.give("q", "k", "v")
    cache = e.backend.new_state("*", e.vector.cfg, len(e.vector.arrays["in.q"]))
    if e.vector.arrays["in.k_before"].shape[1]:
        cache = cache.append(*before, None)
    return {"y": e.fetch(e.backend.ops.attention(q, k, v, cache, e.lengths())[0])}


def route(e: Engine) -> dict:
    """Return weights b l E of all experts, 0 where one is not chosen: the order of the chosen is free."""
    (h,) = e.give("h")
    w = e.mixer()
    routing = e.backend.ops.route(h, w["gate.weight"], w["gate.e_score_correction_bias"], e.vector.cfg)
    return {"weights": dense(e, routing, e.vector.arrays["in.h"].shape[:2])}


def dense(e: Engine, routing, at: tuple[int, ...]) -> np.ndarray:
    """Return the weights of a routing as rows over all experts."""
    expert, weight = (e.fetch(a).reshape(*at, -1) for a in (routing.expert, routing.weight))
    rows = np.zeros((*at, e.vector.cfg.n_routed_experts))
    np.put_along_axis(rows, expert.astype(np.int64), weight, axis=-1)
    return rows


def experts(e: Engine) -> dict:
    """Return r b l x, the weighted sum of the experts that the router chooses for h, of u b l x."""
    h, u = e.give("h", "u")
    w = e.mixer()
    routing = e.backend.ops.route(h, w["gate.weight"], w["gate.e_score_correction_bias"], e.vector.cfg)
    return {"r": e.fetch(e.backend.ops.experts(u, w["experts"], routing))}


def mlp(e: Engine) -> dict:
    """Return y b l d."""
    (h,) = e.give("h")
    w = e.mixer()
    return {"y": e.fetch(e.backend.ops.mlp(h, w["up_proj.weight"], w["down_proj.weight"]))}


def logits(e: Engine) -> dict:
    """Return logits b l v of the hidden state."""
    (h,) = e.give("h")
    return {"logits": e.fetch(e.backend.ops.logits(h, e.weights()[""]["lm_head.weight"]))}


def mixer(e: Engine) -> dict:
    """Return y b l d, what a layer adds to the stream without its norm; of a Mamba layer its state too."""
    kind, (h,) = MIXER_OF[e.vector.operation], e.give("h")
    state = e.backend.new_state(kind, e.vector.cfg, len(e.vector.arrays["in.h"]))
    y, state = MIXERS[kind](h, e.mixer(), e.vector.cfg, state, e.lengths(), e.backend.ops)
    after = {"S": e.fetch(state.S), "tail": e.fetch(state.tail)} if kind == "M" else {}
    return {"y": e.fetch(y)} | after


def read_all(e: Engine, m: Model, pieces: list[np.ndarray]) -> np.ndarray:
    """Return the logits b l v of ids that are read in pieces, one after the other."""
    states, out = m.new_states(len(pieces[0])), []
    for ids in pieces:
        h, states = m.blocks(m.embed(e.backend.array(ids)), states)
        out.append(e.fetch(m.head(h)))
    return np.concatenate(out, axis=1)


def model(e: Engine) -> dict:
    """Return logits of a prompt read at once, token by token, in pieces and in a ragged batch, and states."""
    m, ids, lengths = e.model(), e.vector.arrays["in.ids"], e.vector.arrays["in.lengths"]
    out = {
        "logits": read_all(e, m, [ids]),
        "one_by_one": read_all(e, m, np.split(ids, ids.shape[1], axis=1)),
        "in_pieces": read_all(e, m, np.split(ids, e.vector.constants["cuts"], axis=1)),
    }
    h, states = m.blocks(m.embed(e.backend.array(ids)), m.new_states(len(ids)), e.lengths())
    out |= {"ragged": e.fetch(m.head(h))} | e.states(states, lengths)
    h, _ = m.blocks(m.embed(e.backend.array(e.vector.arrays["in.next"][:, None])), states)
    return out | {"after_ragged": e.fetch(m.head(h))}


def prediction_head(e: Engine) -> dict:
    """Return o b l d and logits b l v of the head at once, token by token; and a draft of two tokens."""
    m, (h,) = e.model(), e.give("h")
    ids, given = e.vector.arrays["in.next_ids"], e.vector.arrays["in.h"]
    o, states = mtp.predict(m, h, e.backend.array(ids), mtp.new_states(m, len(ids)))
    out, one_by_one = {"o": e.fetch(o), "logits": e.fetch(m.head(o))}, []
    each = mtp.new_states(m, len(ids))
    for i in range(ids.shape[1]):
        at = slice(i, i + 1)
        y, each = mtp.predict(m, e.array(given[:, at]), e.backend.array(ids[:, at]), each)
        one_by_one.append(e.fetch(m.head(y)))
    further, _ = mtp.predict(m, o[:, -1:], e.backend.array(e.vector.arrays["in.guess"][:, None]), states)
    return out | {"one_by_one": np.concatenate(one_by_one, axis=1), "further": e.fetch(m.head(further))}


def commit(e: Engine) -> dict:
    """Return logits of the guesses, and of a next token after counts[b] of the guesses were kept."""
    m, given = e.model(), e.vector.arrays
    ids, guess, after = (e.backend.array(given["in." + key]) for key in ("ids", "guess", "next"))
    _, states = m.blocks(m.embed(ids), m.new_states(len(given["in.ids"])))
    h, records = m.blocks(m.embed(guess), states, record=True)
    states = m.commit(states, records, given["in.counts"])
    last, _ = m.blocks(m.embed(after), states)
    return {"guessed": e.fetch(m.head(h)), "after": e.fetch(m.head(last))}


def slots(e: Engine) -> dict:
    """Return logits of a next token for each slot, after sequences joined, moved and forked."""
    m, given = e.model(), e.vector.arrays
    ids, after = (e.backend.array(given["in." + key]) for key in ("ids", "next"))
    _, states = m.blocks(m.embed(ids), m.new_states(len(given["in.ids"])), e.lengths())
    rows, order = (given["in." + key].tolist() for key in ("rows", "order"))
    copied = states_of.take(states_of.fork(states), order)
    states = states_of.put(states, rows, copied)
    h, _ = m.blocks(m.embed(after), states)
    return {"after": e.fetch(m.head(h))}


REPLAY: dict[str, Callable[[Engine], dict]] = {
    "embed": embed,
    "linear": linear,
    "linear_pair": linear_pair,
    "rms_norm": rms_norm,
    "causal_conv": causal_conv,
    "ssd_scan": ssd_scan,
    "gated_rms_norm": gated_rms_norm,
    "attention": attention,
    "route": route,
    "experts": experts,
    "mlp": mlp,
    "logits": logits,
    **dict.fromkeys(MIXER_OF, mixer),
    "model": model,
    "prediction head": prediction_head,
    "commit": commit,
    "slots": slots,
}

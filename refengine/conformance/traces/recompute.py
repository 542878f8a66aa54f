"""Recomputing a trace layer by layer, each from the trace's own input: in float64, or as its dtype rounds.

A layer is a `Unit`. Inside one, every step whose result the trace holds is compared and then replaced by
the trace's, so that the next step starts from what the engine had: an error is seen where it is made, once.
With a `Mistake`, one step is computed wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from refengine.conformance.mistakes import Mistake
from refengine.conformance.traces import Trace, eps_of, packed, pieces, real_positions, sizes, state_sizes
from refengine.conformance.traces.watch import watched_ops
from refengine.conformance.truth import lead
from refengine.spec.arrays import DTYPES, Weight, widen
from refengine.spec.config import Config, InputError
from refengine.spec.mixers import MIXERS
from refengine.spec.moe import Routing, largest, only_best_groups
from refengine.spec.numerics import sigmoid
from refengine.spec.ops import REFERENCE, Ops, embed, numpy_backend
from refengine.spec.state import new_state
from refengine.spec.tensors import Tensor, placed, table
from refengine.untrusted import shown

NARROW = {dtype.name: dtype for dtype in DTYPES.values() if dtype.itemsize == 2}
UNROUNDED = {"router", "logits"}  # float32 in every engine
ROUNDS_INPUT = {
    "in_proj", "out_proj", "qkv_proj", "o_proj", "fc1_latent_proj", "fc2_latent_proj", "experts", "shared",
    "mlp", "eh_proj", "logits",
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Holds what is recomputed at once: a layer, or the parts before and after the layers.

    kind: a letter of the pattern, "outer", or "mtp" for the prediction head's own parts.
    """

    name: str
    kind: str
    blocks: tuple[str, ...] = field(repr=False)  # of the tensor table
    keys: tuple[str, ...] | None = field(
        default=None, repr=False
    )  # only these tensors of the outermost block


@dataclass(frozen=True)
class Found:
    """Holds the values of a unit, by their names in a trace; of a router also the scores it chose by."""

    values: dict[str, np.ndarray]
    scores: np.ndarray | None = None  # b l E


class Recomputation:
    """A trace, and the model that it is held against."""

    def __init__(self, trace: Trace, cfg: Config, read: Callable[[str], Weight]):
        self.trace, self.cfg, self.read = trace, cfg, read
        self.real = real_positions(trace.calls)
        self.blocks: dict[str, list[Tensor]] = {}
        for row in table(cfg):
            self.blocks.setdefault(row.block, []).append(row)
        self.kept: dict = {}  # the placed weights of the unit at hand, and the trace's values of it
        self.head_real = real_positions(trace.head_calls) if min(trace.lengths) > 1 else None
        self._check()

    def units(self) -> Iterator[Unit]:
        """Return the units of the model that the trace can be compared with, in the order of computation."""
        t, cfg, keys = self.trace, self.cfg, tuple[str, ...]()
        outer = ("embeddings.weight", "lm_head.weight", "norm_f.weight")
        if "embeddings" in t or "layers.0.input" in t:
            yield Unit("embeddings", "outer", ("",), outer[:1])
        for i, kind in enumerate(cfg.layers):
            yield Unit(f"layers.{i}", kind, (f"layers.{i}",))
        if "final_hidden" in t or "logits" in t:
            keys = (outer[0 if cfg.tie_word_embeddings else 1], outer[2])
            yield Unit("final", "outer", ("",), keys)
        if not cfg.mtp_layers or self.head_real is None:
            return
        first, last = "mtp.layers.0", f"mtp.layers.{len(cfg.mtp_layers) - 1}"
        if "mtp.eh_proj" in t or f"{first}.input" in t:
            yield Unit("mtp.input", "mtp", ("", first), outer[::2])
        for i, kind in enumerate(cfg.mtp_layers):
            name = f"mtp.layers.{i}"
            if self.input_of(name) and self.output_of(name):
                yield Unit(name, kind, (name,))
        if self.output_of(last) and ("mtp.final_hidden" in t or "mtp.logits" in t):
            keys = (outer[0] if cfg.tie_word_embeddings else outer[1],)
            yield Unit("mtp.final", "mtp", ("", last), keys)

    def borders(self, unit: Unit) -> Iterator[tuple[Unit, str, str]]:
        """Return the borders before a unit: the border as a Unit, and two names that hold the same values.

        These are the output of a layer and the input of the next, where the trace holds both.
        """
        prefix, _, index = unit.name.rpartition(".")
        if not prefix.endswith("layers"):
            return
        after, before = f"{unit.name}.input", f"{prefix}.{int(index) - 1}.output"
        where = f"the stream between layers {int(index) - 1} and {index}"
        if prefix.startswith("mtp"):
            where += " of the head"
        if index == "0":
            before = "mtp.eh_proj" if prefix.startswith("mtp") else "embeddings"
            where = f"the stream between {before} and {unit.name}"
        if before in self.trace and after in self.trace:
            yield Unit(where, "stream", ()), before, after

    def without(self, names: set[str], after: Unit) -> Recomputation:
        """Return the recomputation of a trace without some arrays and the input of the next layer."""
        prefix, _, index = after.name.rpartition(".")
        following = {f"{prefix}.{int(index) + 1}.input"} if index.isdigit() else set()
        kept = {name: a for name, a in self.trace.arrays.items() if name not in names | following}
        other = copy(self)
        other.trace, other.kept = replace(self.trace, arrays=kept), {}
        return other

    def input_of(self, name: str) -> str | None:
        """Return the name under which the trace holds the input of a layer; None if it does not."""
        prefix, _, index = name.rpartition(".")
        i = int(index)
        others = [f"{prefix}.{i - 1}.output"] if i else ["mtp.eh_proj" if "mtp" in name else "embeddings"]
        return next((each for each in (f"{name}.input", *others) if each in self.trace), None)

    def output_of(self, name: str) -> str | None:
        """Return the name under which the trace holds the output of a layer; None if it does not."""
        prefix, _, index = name.rpartition(".")
        names = (f"{name}.output", f"{prefix}.{int(index) + 1}.input")
        return next((each for each in names if each in self.trace), None)

    def stored_as(self, name: str) -> str | None:
        """Return the name under which the trace holds a value; None if it does not."""
        if name.endswith(".output"):
            return self.output_of(name.removesuffix(".output"))
        if name == "embeddings" and name not in self.trace:
            name = "layers.0.input"
        if name == "mtp.eh_proj" and name not in self.trace:
            name = "mtp.layers.0.input"
        if name.endswith(".router"):
            return name if f"{name}.experts" in self.trace and f"{name}.weights" in self.trace else None
        return name if name in self.trace else None

    def last_output(self) -> np.ndarray:
        """Return the stream after the last layer, b l d."""
        return self.given(f"layers.{len(self.cfg.layers) - 1}.output")

    def embedded(self) -> np.ndarray:
        """Return the embeddings of the tokens, where the trace holds no input of the first layer."""
        matrix: Any = self.read("backbone.embeddings.weight")
        return widen(matrix[self.trace.ids], np.float64)

    def real_of(self, name: str) -> np.ndarray:
        """Return which positions of an array hold a token: b l."""
        if name.startswith("mtp.") and self.head_real is not None:
            return self.head_real
        return self.real

    def given(self, name: str) -> np.ndarray:
        """Return a value of the trace: [b l ...], a state as [b ...], a routing as weights [b l E]."""
        kept = self.kept.setdefault("given", {})
        if name not in kept:
            kept[name] = self._given(self.stored_as(name) or name)
        return kept[name]

    def _given(self, stored: str) -> np.ndarray:
        if stored.endswith(".router"):
            return dense(self.routing(stored), self.cfg.n_routed_experts)
        block, _, step = stored.rpartition(".")
        if step in state_sizes(self.cfg):
            return self.trace.state(stored, *state_sizes(self.cfg)[step])
        return self.trace.rows(stored, *self.size(block, step))

    def size(self, block: str, step: str) -> tuple[int, ...]:
        """Return the axes of a value after [b l]."""
        kinds = self.cfg.mtp_layers if block.startswith("mtp") else self.cfg.layers
        kind = kinds[int(block.rpartition(".")[2])] if "layers" in block else ""
        return sizes(self.cfg, kind)[step]

    def routing(self, name: str) -> Routing:
        """Return the router's choice that the trace holds."""
        k, most = (self.cfg.num_experts_per_tok,), self.cfg.n_routed_experts
        expert = self.trace.rows(f"{name}.experts", *k).astype(np.int64)
        weight = self.trace.rows(f"{name}.weights", *k)
        real = self.real_of(name)
        if (expert != self.trace.rows(f"{name}.experts", *k))[real].any():
            raise InputError(f"{self.trace.name}: {name}.experts holds a number that is not whole")
        if ((expert < 0) | (expert >= most))[real].any():
            raise InputError(f"{self.trace.name}: {name}.experts names an expert beyond the {most} there are")
        return Routing(np.clip(expert, 0, most - 1), weight)

    def weights(self, unit: Unit, dtype) -> dict:
        """Return the weights of a unit, placed for NumPy: matrices are widened where they are used."""
        if self.kept.get("unit") != unit:
            self.kept = {"unit": unit}
        if dtype in self.kept:
            return self.kept[dtype]
        narrow = NARROW.get(self.trace.weights_dtype or self.trace.dtype)
        unpacked = NARROW.get(self.trace.packed_dtype or self.trace.weights_dtype)

        def read(row):
            value = self.read(row.name)
            if not isinstance(value, np.ndarray):
                return value if unpacked is None else value.dequantize(unpacked)
            wide = value.dtype.itemsize > 2
            if narrow is not None and row.precision != "small" and wide:
                value = value.astype(narrow)
            return value

        rows = [
            row
            for block in unit.blocks
            for row in self.blocks[block]
            if block or unit.keys is None or row.key in unit.keys
        ]
        place = numpy_backend(dtype, resident=False).place
        self.kept[dtype] = placed(rows, lambda group: place(group, [read(row) for row in group.rows]))
        return self.kept[dtype]

    def run(
        self, unit: Unit, mistake: Mistake | None = None, rounds: bool = False, flip: np.ndarray | None = None
    ) -> Found:
        """Return the values of a unit in float64, or with `rounds` as the trace's dtype rounds them.

        flip: positions [b l] at which the router takes the best of the others for the last of its choice.
        """
        dtype = np.dtype(np.float32 if rounds else np.float64)
        run = Run(self, unit, dtype, mistake, rounds, flip)
        with np.errstate(all="ignore"):
            run.compute()
        values = {name: join(parts) for name, parts in run.values.items()}
        return Found(values, join(run.scores) if run.scores else None)

    def _check(self) -> None:
        t, cfg = self.trace, self.cfg
        ids = max(i for row in t.token_ids for i in row)
        if ids >= cfg.vocab_size:
            raise InputError(f"{t.name}: token id {ids} is not in the vocabulary of {cfg.vocab_size}")
        for i in range(len(cfg.layers)):
            if i and not self.input_of(f"layers.{i}"):
                what = f"neither layers.{i}.input nor layers.{i - 1}.output"
                raise InputError(f"{t.name} lacks the input of layer {i}: it holds {what}")
        last = len(cfg.layers) - 1
        if not self.output_of(f"layers.{last}"):
            raise InputError(f"{t.name} lacks the output of layer {last}: it holds no layers.{last}.output")
        for prefix, count in (("layers.", len(cfg.layers)), ("mtp.layers.", len(cfg.mtp_layers))):
            known = {str(i) for i in range(count)}
            numbered = {n: n[len(prefix) :].split(".")[0] for n in t.arrays if n.startswith(prefix)}
            others = [n for n, number in numbered.items() if number.isdigit() and number not in known]
            if count and others:
                what = f"where the layers of the model are {prefix}0 to {prefix}{count - 1}"
                raise InputError(f"{t.name} holds {shown(sorted(others)[0])}, {what}: it is of another model")


def unread(trace: Trace, cfg: Config) -> list[str]:
    """Return the names in a trace that are no activations of this model, such as misspelled ones."""
    known = set(sizes(cfg, "")) - {"enorm", "hnorm", "eh_proj"}
    for prefix, kinds in (("", cfg.layers), ("mtp.", cfg.mtp_layers)):
        for i, kind in enumerate(kinds):
            names = [*sizes(cfg, kind), *(state_sizes(cfg) if kind == "M" else ())]
            known |= {f"{prefix}layers.{i}.{name}" for name in names}
    if cfg.mtp_layers:
        known |= {f"mtp.{name}" for name in sizes(cfg, "")}
    return sorted(set(trace.arrays) - known)


def half_routings(trace: Trace) -> list[str]:
    """Return the names of experts without weights, and of weights without experts, which are not read."""
    stems = [name.rpartition(".")[0] for name in trace.arrays]
    return sorted(
        name
        for name, stem in zip(trace.arrays, stems, strict=True)
        if stem.endswith(".router") and stems.count(stem) == 1
    )


class Run:
    """One computation of a unit: its values are collected by name, a part for each call."""

    def __init__(self, of: Recomputation, unit: Unit, dtype, mistake, rounds, flip):
        self.of, self.unit, self.dtype, self.mistake, self.flip = of, unit, dtype, mistake, flip
        self.narrow = NARROW.get(of.trace.dtype) if rounds else None
        self.values: dict[str, list[np.ndarray]] = {}
        self.scores: list[np.ndarray] = []
        self.call = 0
        self.forced: dict[str, list] = {}
        self.whole = mistake is not None and mistake.step == "mixer"
        self.w = of.weights(unit, dtype)
        ops: Ops = watched_ops(self.base(), self.w, self.rounding)
        if mistake and not self.whole:
            ops = watched_ops(ops, self.w, self.mistaken)
        self.ops = watched_ops(ops, self.w, self.see)

    def base(self) -> Ops:
        """Return the verbs of NumPy in the dtype of this run."""
        return Ops(**dict(REFERENCE) | {"embed": partial(embed, dtype=self.dtype)})

    def round(self, a):
        """Return values as the trace's dtype holds them."""
        return a if self.narrow is None else a.astype(self.narrow).astype(self.dtype)

    def rounding(self, block: str, step: str, right, args):
        """Run a verb on inputs, and to a result, in the trace's dtype."""
        if self.narrow is None or step in ("all_reduce", "router"):
            return right(*args)
        if step in ROUNDS_INPUT:
            several = 2 if step == "eh_proj" else 1
            args = (*(self.round(a) for a in args[:several]), *args[several:])
        result = right(*args)
        if step in UNROUNDED:
            return result
        if isinstance(result, tuple):
            return (self.round(result[0]), *result[1:])
        return self.round(result)

    def mistaken(self, block: str, step: str, right, args):
        """Run a verb, or the mistake in place of it."""
        kind = self.unit.kind
        if kind == "mtp" and step in ("embeddings", "logits"):
            kind = "outer"
        if self.mistake.at(kind, step):
            return self.mistake.wrong(right, self.of.cfg, *args)
        return right(*args)

    def see(self, block: str, step: str, right, args):
        """Run a verb, store its result, and return the trace's own in place of it if it holds that."""
        if step == "all_reduce":
            return right(*args)
        if step == "router":
            self.scores.append(choice_scores(args[0], args[1], args[2]))
        result = right(*args)
        name = self.name(block, step)
        if name is None:
            return result
        if step == "router":
            if self.flip is not None and not self.of.stored_as(name):
                result = flipped(result, self.scores[-1], self.part(self.flip), args[2], self.of.cfg)
            self.keep(name, dense(result, self.of.cfg.n_routed_experts))
            return self.force_routing(name, result)
        if isinstance(result, tuple):
            self.keep(name, result[0])
            return (self.force(name, result[0]), *result[1:])
        self.keep(name, result)
        return self.force(name, result)

    def name(self, block: str, step: str) -> str | None:
        """Return the name in a trace of a step's result; None if it is not compared."""
        if self.whole and step != "norm":
            return None
        head = self.unit.name.startswith("mtp")
        if step in ("norm_f", "final_layernorm"):
            return "mtp.final_hidden" if head else "final_hidden"
        if step == "embeddings":
            return None if head else "embeddings"
        if step in ("logits", "enorm", "hnorm", "eh_proj"):
            return f"mtp.{step}" if head else step
        return f"{block}.{step}"

    def keep(self, name: str, value: np.ndarray) -> None:
        """Store a value of this call."""
        self.values.setdefault(name, []).append(np.array(value, np.float64))

    def part(self, a: np.ndarray) -> np.ndarray:
        """Return the part of an array of positions that belongs to this call."""
        return list(pieces(a, self.calls))[self.call][0]

    def force(self, name: str, value):
        """Return the trace's value in place of a computed one, where it holds that."""
        if self.whole or not self.of.stored_as(name):
            return value
        if name not in self.forced:
            self.forced[name] = [p for p, _ in pieces(self.of.given(name), self.calls)]
        return self.forced[name][self.call].astype(self.dtype).reshape(value.shape)

    def force_routing(self, name: str, routing: Routing) -> Routing:
        """Return the trace's routing in place of a computed one, where it holds that."""
        if self.whole or not self.of.stored_as(name):
            return routing
        if name not in self.forced:
            given = self.of.routing(name)
            parts = (pieces(given.expert, self.calls), pieces(given.weight, self.calls))
            self.forced[name] = [Routing(e[0], w[0].astype(self.dtype)) for e, w in zip(*parts, strict=True)]
        return self.forced[name][self.call]

    @property
    def calls(self) -> list[list[int]]:
        """Return the calls of this unit."""
        return self.of.trace.head_calls if self.unit.name.startswith("mtp") else self.of.trace.calls

    def each_call(self, a: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Return the parts of an array of positions, and the lengths of their rows; each begins a call."""
        for i, part in enumerate(pieces(a, self.calls)):
            self.call = i
            yield part

    def compute(self) -> None:
        """Run the unit over all calls."""
        by_name = {
            "embeddings": self.embeddings, "final": self.final, "mtp.input": self.head_input,
            "mtp.final": self.head_final,
        }  # fmt: skip
        by_name.get(self.unit.name, self.layer)()

    def embeddings(self) -> None:
        """Look the tokens up."""
        for ids, _ in self.each_call(self.of.trace.ids):
            self.ops.embed(ids, self.w[""]["embeddings.weight"])

    def layer(self) -> None:
        """Run the norm and the mixer, and add the mixer's result to the stream."""
        of, unit, cfg, w = self.of, self.unit, self.of.cfg, self.w[self.unit.name]
        stored = of.input_of(unit.name)
        x = of.given(stored) if stored else of.embedded()
        state: Any = new_state(unit.kind, cfg, len(x), self.dtype)
        mixer = self.mistake.wrong if self.whole else MIXERS[unit.kind]
        for part, lengths in self.each_call(x):
            part = part.astype(self.dtype)
            h, _ = self.ops.rms_norm(part, None, w["norm.weight"], cfg.layer_norm_epsilon)
            delta, state = mixer(h, w["mixer"], cfg, state, lengths, self.ops)
            out = self.round(part + delta)
            if self.mistake and self.mistake.step == "output":
                out = self.mistake.wrong(None, cfg, part, delta)
            self.keep(f"{unit.name}.output", out)
        if unit.kind == "M":
            self.keep(f"{unit.name}.S", state.S)
            self.keep(f"{unit.name}.tail", state.tail)

    def final(self) -> None:
        """Run the final norm and the output layer."""
        of, w = self.of, self.w[""]
        matrix = w["embeddings.weight" if of.cfg.tie_word_embeddings else "lm_head.weight"]
        for x, _ in self.each_call(of.last_output()):
            x = x.astype(self.dtype)
            h, _ = self.ops.rms_norm(x, None, w["norm_f.weight"], of.cfg.layer_norm_epsilon)
            if "logits" in of.trace:
                self.ops.logits(h, matrix)

    def head_input(self) -> None:
        """Run what the prediction head makes of the hidden state and the next token."""
        of, w, eps = self.of, self.w["mtp.layers.0"], self.of.cfg.layer_norm_epsilon
        t, x = of.trace, packed(of.last_output(), of.trace.calls).astype(self.dtype)
        ids = packed(t.ids, t.calls)
        if "final_hidden" in t:
            hidden = packed(of.given("final_hidden"), t.calls).astype(self.dtype)
        else:
            hidden, _ = REFERENCE.rms_norm(x, None, self.w[""]["norm_f.weight"], eps)
        before, after, x, hidden = ids[:, :-1], ids[:, 1:], x[:, :-1], hidden[:, :-1]
        if self.mistake and self.mistake.step == "next_ids":
            after = self.mistake.wrong(None, of.cfg, before, after)
        if self.mistake and self.mistake.step == "hidden":
            hidden = self.mistake.wrong(None, of.cfg, x, hidden)
        e = self.round(self.ops.embed(after, self.w[""]["embeddings.weight"]))
        e, _ = self.ops.rms_norm(e, None, w["enorm.weight"], eps)
        g, _ = self.ops.rms_norm(hidden, None, w["hnorm.weight"], eps)
        self.ops.linear_pair(e, g, w["eh_proj.weight"])

    def head_final(self) -> None:
        """Run the prediction head's final norm and the output layer."""
        of, cfg = self.of, self.of.cfg
        last = f"mtp.layers.{len(cfg.mtp_layers) - 1}"
        x = of.given(f"{last}.output").astype(self.dtype)
        h, _ = self.ops.rms_norm(x, None, self.w[last]["final_layernorm.weight"], cfg.layer_norm_epsilon)
        if "mtp.logits" in of.trace:
            self.ops.logits(
                h, self.w[""]["embeddings.weight" if cfg.tie_word_embeddings else "lm_head.weight"]
            )


def dense(routing: Routing, count: int) -> np.ndarray:
    """Return a routing as weights of all experts, 0 where one was not chosen: b l E."""
    out = np.zeros((*np.shape(routing.expert)[:-1], count))
    np.put_along_axis(out, np.asarray(routing.expert), np.asarray(routing.weight, np.float64), axis=-1)
    return out


def choice_scores(h, gate, bias) -> np.ndarray:
    """Return the scores that a router chooses by, b l E."""
    return (sigmoid(h @ widen(gate, h.dtype).T) + bias).astype(np.float64)


def margin(scores: np.ndarray, cfg: Config) -> np.ndarray:
    """Return by how much the last chosen expert, or group, was ahead of the next: b l."""
    won = np.full(scores.shape[:-1], np.inf)
    if cfg.n_group > 1:
        by_group = np.sort(scores.reshape(*scores.shape[:-1], cfg.n_group, -1), axis=-1)
        won = lead(by_group[..., -2:].sum(-1), cfg.topk_group)
        scores = only_best_groups(scores, cfg.n_group, cfg.topk_group)
    return np.minimum(won, lead(scores, cfg.num_experts_per_tok))


def flipped(routing: Routing, scores: np.ndarray, where: np.ndarray, bias, cfg: Config) -> Routing:
    """Return a routing with the best of the others for the last of the chosen, at some positions."""
    k = cfg.num_experts_per_tok
    if k >= scores.shape[-1]:
        return routing
    c = only_best_groups(scores, cfg.n_group, cfg.topk_group) if cfg.n_group > 1 else scores
    expert = np.array(largest(c, k + 1))
    expert[..., k - 1] = expert[..., k]
    expert = expert[..., :k]
    weight = np.take_along_axis(scores - bias, expert, axis=-1)
    if cfg.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    weight = (weight * cfg.routed_scaling_factor).astype(routing.weight.dtype)
    at = where[..., None]
    return Routing(np.where(at, expert, routing.expert), np.where(at, weight, routing.weight))


def join(parts: list[Any]) -> np.ndarray:
    """Return the parts of several calls as one array."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def roundoff(dtype: str) -> float:
    """Return the distance of 1 from the next number of a dtype."""
    return eps_of(dtype)

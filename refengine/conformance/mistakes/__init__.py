"""Known mistakes in implementations of Nemotron 3, as data: each is one step of the model computed wrongly.

A `Mistake` replaces one step of one kind of layer (`watch.STEPS`) by a wrong function, which gets the right
one, the config and the arguments. `diff` recomputes a layer with each of them to name the cause of a
departure, and the tests plant each of them to see that the suite goes red. Numbers of traps: docs/model.md,
"The ten traps".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from refengine.conformance.mistakes import layers as wrong
from refengine.conformance.mistakes import mamba as bad
from refengine.conformance.traces.watch import VERB_OF
from refengine.spec.config import Config
from refengine.spec.model import Model
from refengine.spec.numerics import sigmoid, silu
from refengine.spec.ops import Ops


@dataclass(frozen=True)
class Mistake:
    """Holds one mistake: `wrong(right, cfg, *arguments)` in place of a step of a kind of layer.

    kind: letters of the layers, or "outer" for what comes before and after them, or "mtp" for the head's own
    parts. step "mixer": wrong is a whole mixer instead.
    """

    name: str
    kind: str
    step: str
    wrong: Callable
    trap: int | None = None

    def __str__(self) -> str:
        return f"{self.name} (trap {self.trap})" if self.trap else self.name

    def at(self, kind: str, step: str) -> bool:
        """Return whether the mistake is in this step of a layer of this kind."""
        inside = kind == self.kind if self.kind in ("outer", "mtp") else kind in self.kind and len(kind) == 1
        return inside and step == self.step

    def verbs(self, ops: Ops, cfg: Config) -> dict[str, Callable]:
        """Return {verb: wrong function} to replace verbs of `ops`, of a step with a verb of its own."""
        verb = VERB_OF[self.step]
        return {verb: partial(self.wrong, getattr(ops, verb), cfg)}

    def planted(self, model: Model) -> Callable:
        """Return the call (`watch.On`) that makes the mistake in every layer of a model that can have it."""

        def on(block: str, step: str, right: Callable, args: tuple) -> Any:
            kind = kind_of(model.cfg, block, step)
            last = step in ("norm", "norm_f", "final_layernorm")
            if last and self.step == "output" and args[1] is not None:
                x = self.wrong(None, model.cfg, *args[:2])
                return right(x, None, *args[2:])
            return self.wrong(right, model.cfg, *args) if self.at(kind, step) else right(*args)

        return on


def kind_of(cfg: Config, block: str, step: str) -> str:
    """Return the kind of a step: a letter inside a layer, "mtp" in the head's own parts, else "outer"."""
    if block == "mtp" or step in ("enorm", "hnorm", "eh_proj", "final_layernorm"):
        return "mtp"
    head, _, index = block.rpartition("layers.")
    if not index:
        return "outer"
    return (cfg.mtp_layers if head else cfg.layers)[int(index)]


def mamba(name: str, step: str, function: Callable, trap: int | None = None) -> Mistake:
    """Return a mistake of a Mamba layer."""
    return Mistake(name, "M", step, function, trap)


def attends(name: str, function: Callable, trap: int | None = None, step: str = "attention") -> Mistake:
    """Return a mistake of an attention layer."""
    return Mistake(name, "*", step, function, trap)


def moe(name: str, step: str, function: Callable, trap: int | None = None) -> Mistake:
    """Return a mistake of a layer of experts."""
    return Mistake(name, "E", step, function, trap)


def stream(name: str, step: str, function: Callable, trap: int | None = None) -> Mistake:
    """Return a mistake of any layer."""
    return Mistake(name, "M*E-", step, function, trap)


def head(name: str, step: str, function: Callable, trap: int | None = None) -> Mistake:
    """Return a mistake of the prediction head's own parts."""
    return Mistake(name, "mtp", step, function, trap)


def nothing(value):
    """Return zeros of the shape of a value."""
    return value * 0


MISTAKES = (
    # Mamba: dt and the scan
    mamba(
        "dt is held up at 0.001 in calls of several tokens", "scan", bad.clamped(1e-3, several_only=True), 1
    ),
    mamba("dt is held up at 0.001 in every call", "scan", bad.clamped(1e-3), 1),
    mamba("dt is held between 0.001 and 0.1", "scan", bad.clamped(1e-3, 0.1), 1),
    mamba("the config's time_step_limit is not obeyed", "scan", bad.unlimited),
    mamba("dt_bias is added after the softplus", "scan", bad.scan(bias_first=False)),
    mamba("dt_bias is left out", "scan", bad.scan(bias=False)),
    mamba("dt goes through relu, not softplus", "scan", bad.scan(softplussed=False)),
    mamba("A is exp(A_log), without the minus", "scan", bad.scan(sign=1)),
    mamba("the decay is exp(A), without dt", "scan", bad.scan(decays_once=False)),
    mamba("x enters the state without dt", "scan", bad.scan(stepped=False)),
    mamba("head i reads group i % n_groups of B and C", "scan", bad.scan(interleaved=True)),
    mamba("B and C change places", "scan", bad.scan_of(lambda a, cfg: {"B": a["C"], "C": a["B"]})),
    mamba("the skip D x is left out", "scan", bad.scan(skip=0)),
    mamba("y is read before the state is updated", "scan", bad.scan(late=True)),
    mamba("each chunk begins with an empty state", "scan", bad.scan(forgets=True)),
    mamba("a chunk's state is scaled and not carried on", "scan", bad.scaled_chunks()),
    mamba(
        "a chunk's state is scaled and not carried on, and dt is held up at 0.001, as in transformers 5.14",
        "scan", bad.scaled_chunks(1e-3), 1,
    ),
    mamba("each call begins with an empty state", "scan", bad.scan_of(lambda a, cfg: {"S": a["S"] * 0})),
    mamba("padding enters the state", "scan", bad.scan_of(lambda a, cfg: {"lengths": None})),
    mamba("the state is kept in bfloat16", "scan", bad.scan(rounds=True)),
    # Mamba: the convolution
    mamba("the kernel of the convolution is flipped", "conv", bad.conv_of(weight=lambda w: w[..., ::-1])),
    mamba("the bias of the convolution is left out", "conv", bad.conv_of(bias=nothing)),
    mamba("SiLU is on x only, not on B and C", "conv", bad.conv_activated("x")),
    mamba("no SiLU after the convolution", "conv", bad.conv_activated()),
    mamba("each call begins with an empty tail", "conv", bad.conv_of(tail=nothing)),
    mamba("padding enters the tail", "conv", bad.conv_of(lengths=lambda n: None)),
    mamba("the tail is kept after the activation", "conv", bad.tail_after_the_activation),
    mamba("the convolution sees one token ahead", "conv", bad.conv_sees_the_next),
    # Mamba: the gated norm and the projections
    mamba("the norm comes before the gate", "gated_norm", bad.gated(gate_first=False), 2),
    mamba("the norm is over all of the inner width", "gated_norm", bad.gated(groups=lambda cfg: 1), 2),
    mamba("the norm is over each head", "gated_norm", bad.gated(groups=lambda cfg: cfg.mamba_num_heads)),
    mamba("the gate goes through sigmoid, not silu", "gated_norm", bad.gated(gate=sigmoid)),
    mamba("y gates z", "gated_norm", bad.gated(gated_by_y=True)),
    mamba("the gated norm has eps 1e-6", "gated_norm", bad.gated(eps=lambda e: 1e-6)),
    mamba("the gated norm has eps 1e-5", "gated_norm", bad.gated(eps=lambda e: 1e-5)),
    mamba("the weight of the gated norm is left out", "gated_norm", bad.gated(weight=False)),
    mamba("z and x change places in in_proj", "in_proj", bad.swapped_rows("z", "x")),
    mamba("B and C change places in in_proj", "in_proj", bad.swapped_rows("B", "C")),
    # attention
    attends("rotary position embedding", wrong.rotary(), 3),
    attends("rotary position embedding of half of each head", wrong.rotary(share=0.5), 3),
    attends("query head i reads key head i % kv", wrong.interleaved_heads),
    attends("scores are not divided by sqrt(head_dim)", wrong.scaled_scores(lambda e, c: e**0.5)),
    attends("scores are divided by sqrt(head_dim) twice", wrong.scaled_scores(lambda e, c: e**-0.5)),
    attends(
        "scores are divided by sqrt(hidden_size / heads)",
        wrong.scaled_scores(lambda e, c: (e * c.num_attention_heads / c.hidden_size) ** 0.5),
    ),
    attends("scores outside the mask are 0, not -inf", wrong.masked(value=0.0)),
    attends("every token of the call is seen", wrong.masked(ahead=1 << 30)),
    attends("one token ahead is seen", wrong.masked(ahead=1)),
    attends("a token does not see itself", wrong.masked(ahead=-1)),
    attends("a call does not see the ones before it", wrong.masked(own_only=True)),
    attends("padding enters the cache", wrong.keeps_padding),
    attends("the scores are rounded to bfloat16", wrong.half_softmax),
    attends("k and v change places", wrong.swapped_columns("k", "v"), step="qkv_proj"),
    # experts: the router
    moe("the router is a softmax", "router", wrong.router(softmax=True)),
    moe("the correction bias weighs the experts", "router", wrong.router(by_bias=True)),
    moe("the correction bias is left out", "router", wrong.router(biased=False)),
    moe("weights are not normalised", "router", wrong.router(normalised=False)),
    moe("weights are normalised although norm_topk_prob is false", "router", wrong.router(normalised=True)),
    moe("routed_scaling_factor is forgotten", "router", wrong.router(scale=lambda s: 1.0)),
    moe("routed_scaling_factor is applied twice", "router", wrong.router(scale=lambda s: s * s)),
    moe("the router computes in bfloat16", "router", wrong.router(half=True)),
    moe("groups do not limit the choice", "router", wrong.router(groups=False)),
    moe("a group scores its one best expert", "router", wrong.router(best_one=True)),
    moe("experts of other groups score 0, not -inf", "router", wrong.router(mask=0.0)),
    moe("the least of the chosen experts is left out", "router", wrong.fewer_experts),
    # experts: what they compute
    moe("an expert has a gate projection", "experts", wrong.experts_of(wrong.gated_by_itself), 5),
    moe("relu is not squared in the experts", "experts", wrong.experts_of(wrong.relu), 5),
    moe("the experts have gelu", "experts", wrong.experts_of(wrong.gelu), 5),
    moe("a token is weighed before its expert", "experts", wrong.experts_of(weighed_before=True)),
    moe("experts are in the order of their names as text", "experts", wrong.experts_of(order=wrong.as_text)),
    moe("the experts' sum is divided by their number", "experts", wrong.experts_of(averaged=True)),
    moe("relu is not squared in the shared expert", "shared", wrong.mlp_of(wrong.relu), 5),
    moe("the shared expert is left out", "shared", wrong.times(lambda c: 0.0)),
    moe("the shared expert is scaled too", "shared", wrong.times(lambda c: c.routed_scaling_factor)),
    moe("the router reads the latent", "mixer", wrong.reads_through_latent(router=True), 6),
    moe("the shared expert reads the latent", "mixer", wrong.reads_through_latent(shared=True), 6),
    # dense layers
    Mistake("relu is not squared", "-", "mlp", wrong.mlp_of(wrong.relu), 5),
    Mistake("the MLP has silu", "-", "mlp", wrong.mlp_of(silu), 5),
    Mistake("the MLP has a gate", "-", "mlp", wrong.mlp_of(wrong.gated_by_itself), 5),
    # the stream
    stream("the layer's norm multiplies by 1 + w", "norm", wrong.norm(plus_one=True)),
    stream("the layer's norm has no weight", "norm", wrong.norm(weight=False)),
    stream("the layer's norm is a LayerNorm", "norm", wrong.norm(centred=True)),
    stream("the layer's norm has no eps", "norm", wrong.norm(eps=lambda e: 0.0)),
    stream("the layer's norm has eps 1e-6", "norm", wrong.norm(eps=lambda e: 1e-6)),
    stream("the layer's norm has eps 1e-5", "norm", wrong.norm(eps=lambda e: 1e-5)),
    stream("the residual is dropped", "output", wrong.dropped_residual),
    stream("the residual is added twice", "output", wrong.doubled_residual),
    # before and after the layers
    Mistake("the embedding is multiplied by sqrt(hidden_size)", "outer", "embeddings", wrong.scaled),
    Mistake("the final norm is a LayerNorm", "outer", "norm_f", wrong.norm(centred=True)),
    Mistake("the final norm multiplies by 1 + w", "outer", "norm_f", wrong.norm(plus_one=True)),
    Mistake("the final norm has eps 1e-6", "outer", "norm_f", wrong.norm(eps=lambda e: 1e-6)),
    Mistake("the final norm has eps 1e-5", "outer", "norm_f", wrong.norm(eps=lambda e: 1e-5)),
    # the prediction head
    head("the hidden comes before the embedding", "eh_proj", wrong.swapped_pair, 7),
    head("the head reads the hidden before the final norm", "hidden", wrong.before_the_final_norm, 7),
    head("the head reads the token at its own position", "next_ids", wrong.not_shifted),
    head(
        "the head's final norm is a LayerNorm, as in llama.cpp", "final_layernorm", wrong.norm(centred=True)
    ),
    head("the head's final norm has eps 1e-6", "final_layernorm", wrong.norm(eps=lambda e: 1e-6)),
    head("the head's final norm has eps 1e-5", "final_layernorm", wrong.norm(eps=lambda e: 1e-5)),
    head("the embedding is not normalised in the head", "enorm", lambda right, cfg, x, *rest: (x, x)),
    head("the hidden is not normalised in the head", "hnorm", lambda right, cfg, x, *rest: (x, x)),
    head("enorm multiplies by 1 + w", "enorm", wrong.norm(plus_one=True)),
)  # fmt: skip


def named(name: str) -> Mistake:
    """Return the mistake of this name; KeyError for another."""
    return {mistake.name: mistake for mistake in MISTAKES}[name]

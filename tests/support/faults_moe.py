"""Broken verbs of the experts, and broken pieces of the spec, for test_teeth_experts.py to plant."""

from __future__ import annotations

import dataclasses

import numpy as np

import refengine.spec.keys
import refengine.spec.model
from refengine.spec.model import Model
from refengine.spec.moe import Routing, largest, mlp, only_best_groups
from refengine.spec.numerics import sigmoid, silu
from refengine.spec.state import Cache


def router(
    *,
    softmax=False,
    by_bias=False,
    normalised=None,
    scaled=True,
    guard=1e-20,
    highest=False,
    groups=True,
    mask=-np.inf,
    only_one=False,
):
    """The router, with one thing wrong."""

    def broken(h, gate, bias, cfg):
        logits = h @ gate.T
        s = np.exp(logits - logits.max(-1, keepdims=True)) if softmax else sigmoid(logits)
        s = s / s.sum(-1, keepdims=True) if softmax else s
        c = s + bias
        if cfg.n_group > 1 and groups:
            c = only_best_groups(c, cfg.n_group, cfg.topk_group) if not only_one else best_of_one(c, cfg)
            c = np.where(np.isinf(c), mask, c)
        expert = largest(c, cfg.num_experts_per_tok)
        if highest:
            expert = c.shape[-1] - 1 - largest(c[..., ::-1], cfg.num_experts_per_tok)
        w = np.take_along_axis(c if by_bias else s, expert, axis=-1)
        if cfg.norm_topk_prob if normalised is None else normalised:
            with np.errstate(invalid="ignore"):
                w = w / (w.sum(-1, keepdims=True) + guard)
        return Routing(expert, (w * (cfg.routed_scaling_factor if scaled else 1)).astype(h.dtype))

    return broken


def best_of_one(c, cfg):
    """A group scores its one best expert, not the sum of its two best."""
    by_group = c.reshape(*c.shape[:-1], cfg.n_group, -1)
    kept = np.zeros(by_group.shape[:-1], bool)
    np.put_along_axis(kept, largest(by_group.max(-1), cfg.topk_group), True, axis=-1)
    return np.where(kept[..., None], by_group, -np.inf).reshape(c.shape)


def gated_mlp(h, up, down):
    u = h @ up.T
    return (silu(u) * u) @ down.T


def relu_mlp(h, up, down):
    return np.maximum(h @ up.T, 0) @ down.T


def experts_of(expert_mlp):
    """The definition of the experts, around another expert."""

    def experts(u, matrices, routing):
        y = np.zeros_like(u)
        for at in np.ndindex(routing.expert.shape):
            y[at[:-1]] += routing.weight[at] * expert_mlp(u[at[:-1]], *matrices[routing.expert[at]])
        return y

    return experts


def experts_weighed_before(u, matrices, routing):
    y = np.zeros_like(u)
    for at in np.ndindex(routing.expert.shape):
        y[at[:-1]] += mlp(routing.weight[at] * u[at[:-1]], *matrices[routing.expert[at]])
    return y


def moe_layer(*, router_reads_latent=False, shared_reads_latent=False):
    """The mixer, with someone reading what went through the latent instead of the full width."""

    def mixer(h, w, cfg, state, n, ops, record=False):
        u = ops.linear(h, w["fc1_latent_proj.weight"])
        through = ops.linear(u, w["fc2_latent_proj.weight"])
        routing = ops.route(
            through if router_reads_latent else h, w["gate.weight"], w["gate.e_score_correction_bias"], cfg
        )
        shared = ops.mlp(
            through if shared_reads_latent else h,
            w["shared_experts.up_proj.weight"],
            w["shared_experts.down_proj.weight"],
        )
        return ops.linear(ops.experts(u, w["experts"], routing), w["fc2_latent_proj.weight"]) + shared, state

    return mixer


def hidden_before_the_final_norm(patch):
    right = refengine.spec.model.run
    patch.setattr(refengine.spec.model, "run", lambda x, layers, final, *rest: right(x, layers, None, *rest))


def norm_after_every_stage(patch):
    right = Model.blocks

    def blocks(self, x, states, n=None, first=0, last=None, tap=None):
        h, states = right(self, x, states, n, first, last, tap)
        return (h if last is None else h / np.sqrt((h * h).mean(-1, keepdims=True)).astype(h.dtype)), states

    patch.setattr(Model, "blocks", blocks)


def forks_write_over_each_other(patch):
    right = Cache.append

    def append(self, k, v, n=None):
        return right(dataclasses.replace(self, written=self.length.copy()), k, v, n)

    patch.setattr(Cache, "append", append)


def all_of_a_record_is_kept(patch):
    right = refengine.spec.model.replay
    patch.setattr(
        refengine.spec.model,
        "replay",
        lambda kind, record, w, cfg, state, most, n, ops: right(kind, record, w, cfg, state, most, None, ops),
    )


def commit_forgets_the_tail(patch):
    right = refengine.spec.model.replay

    def replay(kind, record, w, cfg, state, *rest):
        after = right(kind, record, w, cfg, state, *rest)
        return dataclasses.replace(after, tail=state.tail) if kind == "M" else after

    patch.setattr(refengine.spec.model, "replay", replay)


def recorded_call_moves_the_lengths(patch):
    right = Cache.tentative

    def tentative(self):
        self.length[:] += 1
        return right(self)

    patch.setattr(Cache, "tentative", tentative)


def head_of_the_last_row(patch):
    def head(self, h, rows=None):
        return self.backend.ops.logits(h if rows is None else h[:, -1], self.weights[""]["lm_head.weight"])

    patch.setattr(Model, "head", head)


def pattern_before_list(patch):
    right = refengine.spec.keys._letters
    wrong = lambda hf, lists, pattern: hf.get(pattern) or right(hf, lists, pattern)  # noqa: E731
    patch.setattr(refengine.spec.keys, "_letters", wrong)


def one_end_token(patch):
    right = refengine.spec.keys._listed
    patch.setattr(refengine.spec.keys, "_listed", lambda value: [2] if value == [2, 11] else right(value))


def flushing_widen(a, dtype):
    wide = a.astype(dtype)
    return np.where(np.abs(wide) < 1e-37, 0, wide).astype(dtype)

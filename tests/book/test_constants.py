"""Every constant of the configuration is obeyed, at values that no release has, by a literal reading of it.

`Literal` is an independent implementation of the whole model and its prediction head, for one sequence in
float64; it shares no code with the book. So a constant that is fixed at the released value in any place fails
a test. Another test shows that each constant makes a difference far beyond rounding.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import CUTS, Case, agree, cases, cut, terms
from refengine.conformance.truth import counted
from refengine.spec import mtp
from refengine.spec.config import Config
from refengine.spec.model import Model
from refengine.spec.numerics import tolerance

# The constants that are neither a size, nor a token id, nor the letters of the layers.
CONSTANTS = {
    "layer_norm_epsilon": (0.2, 3e-3, 1e-5),
    "time_step_limit": ((0.05, 0.4), (0.3, math.inf), (0.0, 0.02), (0.0, math.inf)),
    "routed_scaling_factor": (0.7, 1.9, 2.5),
    "norm_topk_prob": (False, True),
    "topk_group": (1, 2, 3),
    "tie_word_embeddings": (True, False),
}
NO_CONSTANTS = {"layers", "mtp_layers", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"}


class Literal:
    """The model of a configuration, written from the equations for one sequence of ids.

    margin: the distance of the closest choice of the router. stretch: the largest factor by which a gated
    norm enlarged a group, and so the rounding before it.
    """

    def __init__(self, cfg: Config, read):
        self.cfg, self.margin, self.stretch = cfg, math.inf, 1.0
        self.read = lambda name: read(name).astype(np.float64)

    def logits(self, ids) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits of the trunk [l v] and of the head [l-1 v], which reads the next token too."""
        table = self.read("backbone.embeddings.weight")
        x = table[ids]
        for i, kind in enumerate(self.cfg.layers):
            x = x + self.mixer(kind, f"backbone.layers.{i}", x)
        h = self.norm(x, "backbone.norm_f")
        last = table if self.cfg.tie_word_embeddings else self.read("lm_head.weight")
        return h @ last.T, self.head(h[:-1], table[ids[1:]]) @ last.T

    def head(self, h, following):
        """Return the output of the prediction head for h [l d] and the embeddings of the next tokens."""
        if not self.cfg.mtp_layers:
            return h[:0]
        first, end = "mtp.layers.0", f"mtp.layers.{len(self.cfg.mtp_layers) - 1}"
        pair = [self.norm(following, f"{first}.enorm"), self.norm(h, f"{first}.hnorm")]
        v = np.concatenate(pair, axis=1) @ self.read(f"{first}.eh_proj.weight").T
        for i, kind in enumerate(self.cfg.mtp_layers):
            v = v + self.mixer(kind, f"mtp.layers.{i}", v)
        return self.norm(v, f"{end}.final_layernorm")

    def norm(self, x, name: str):
        """Return each row of x divided by its root mean square, times a weight."""
        square = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(square + self.cfg.layer_norm_epsilon) * self.read(f"{name}.weight")

    def mixer(self, kind: str, name: str, x):
        """Return the output of one layer for the stream x [l d]."""
        h = self.norm(x, f"{name}.norm")
        reading = {"M": self.mamba, "*": self.attention, "E": self.experts, "-": self.mlp}[kind]
        return reading(f"{name}.mixer.", h)

    def mlp(self, name: str, h, up: str = "up_proj", down: str = "down_proj"):
        inner = np.maximum(h @ self.read(f"{name}{up}.weight").T, 0)
        return inner**2 @ self.read(f"{name}{down}.weight").T

    def attention(self, name: str, h):
        c = self.cfg
        q, k, v = (h @ self.read(f"{name}{part}_proj.weight").T for part in "qkv")
        y, shared = np.zeros_like(q), c.num_attention_heads // c.num_key_value_heads
        for i in range(len(h)):
            for head in range(c.num_attention_heads):
                mine = slice(head * c.head_dim, (head + 1) * c.head_dim)
                theirs = slice(head // shared * c.head_dim, (head // shared + 1) * c.head_dim)
                scores = k[: i + 1, theirs] @ q[i, mine] / math.sqrt(c.head_dim)
                weights = np.exp(scores - scores.max())
                y[i, mine] = weights @ v[: i + 1, theirs] / weights.sum()
        return y @ self.read(f"{name}o_proj.weight").T

    def mamba(self, name: str, h):
        c = self.cfg
        H, P, G, N, K = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.conv_kernel
        inner, width = H * P, H * P + 2 * G * N
        rows = h @ self.read(f"{name}in_proj.weight").T
        z, channels, raw = rows[:, :inner], rows[:, inner : inner + width], rows[:, inner + width :]
        taps, bias = self.read(f"{name}conv1d.weight")[:, 0], self.read(f"{name}conv1d.bias")
        past = np.concatenate([np.zeros((K - 1, width)), channels])
        A, D, shift = (self.read(f"{name}{key}") for key in ("A_log", "D", "dt_bias"))
        S, y = np.zeros((H, P, N)), np.zeros((len(h), inner))
        for t in range(len(h)):
            u = bias + sum(taps[:, j] * past[t + j] for j in range(K))
            u = u / (1 + np.exp(-u))
            x, B, C = u[:inner].reshape(H, P), u[inner : inner + G * N], u[inner + G * N :]
            for head in range(H):
                group = slice(head // (H // G) * N, (head // (H // G) + 1) * N)
                step = math.log1p(math.exp(raw[t, head] + shift[head]))
                step = min(max(step, c.time_step_limit[0]), c.time_step_limit[1])
                S[head] = math.exp(-step * math.exp(A[head])) * S[head] + step * np.outer(x[head], B[group])
                y[t, head * P : (head + 1) * P] = S[head] @ C[group] + D[head] * x[head]
        u = y * z / (1 + np.exp(-z))
        for group in np.split(np.arange(inner), G):
            rms = np.sqrt((u[:, group] ** 2).mean(axis=1, keepdims=True) + c.layer_norm_epsilon)
            self.stretch = max(self.stretch, float((1 / rms).max()))
            u[:, group] = u[:, group] / rms
        return u * self.read(f"{name}norm.weight") @ self.read(f"{name}out_proj.weight").T

    def experts(self, name: str, h):
        c, y = self.cfg, self.mlp(name, h, "shared_experts.up_proj", "shared_experts.down_proj")
        u = h @ self.read(f"{name}fc1_latent_proj.weight").T if c.moe_latent_size else h
        for t in range(len(h)):
            s = 1 / (1 + np.exp(-self.read(f"{name}gate.weight") @ h[t]))
            chosen = self.chosen(s + self.read(f"{name}gate.e_score_correction_bias"))
            total = sum(s[e] for e in chosen) if c.norm_topk_prob else 1.0
            r = np.zeros(u.shape[1])
            for e in chosen:
                weight = s[e] / total * c.routed_scaling_factor
                r += weight * self.mlp(name, u[t], f"experts.{e}.up_proj", f"experts.{e}.down_proj")
            y[t] += self.read(f"{name}fc2_latent_proj.weight") @ r if c.moe_latent_size else r
        return y

    def chosen(self, c) -> list[int]:
        """Return the experts of a token by score plus bias, within the best groups."""
        size = self.cfg.n_routed_experts // self.cfg.n_group
        groups = [list(range(g * size, (g + 1) * size)) for g in range(self.cfg.n_group)]
        if self.cfg.n_group > 1:
            value = {g: sum(sorted(c[e] for e in groups[g])[-2:]) for g in range(self.cfg.n_group)}
            groups = [groups[g] for g in self.best(value, self.cfg.topk_group)]
        open_to = {e: c[e] for e in sorted(e for group in groups for e in group)}
        return self.best(open_to, self.cfg.num_experts_per_tok)

    def best(self, value: dict, count: int) -> list[int]:
        """Return the keys of the largest values, the first of equal ones, and record the margin."""
        order = sorted(value, key=lambda key: -value[key])
        if count < len(order):
            self.margin = min(self.margin, value[order[count - 1]] - value[order[count]])
        return order[:count]


LAYERS = st.sampled_from(("M", "E", "*M", "ME", "M*E-"))


@st.composite
def odd(draw) -> tuple[Case, dict]:
    """Draw a case of few tokens, and a value for each constant except the tied embedding."""
    case = draw(cases(LAYERS, max_length=9, mtp_layers="*E", tied=draw(st.booleans())))
    names = ("layer_norm_epsilon", "time_step_limit", "routed_scaling_factor", "norm_topk_prob", "topk_group")
    chosen = {name: draw(st.sampled_from(CONSTANTS[name])) for name in names}
    groups = case.n_group
    if groups == 1 or chosen["topk_group"] * case.n_routed_experts // groups < case.num_experts_per_tok:
        chosen["topk_group"] = groups
    return case, chosen


def answers(backend, case: Case, cfg: Config, pieces: list[slice]) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits of trunk and head, [b l v] and [b l-1 v], of a prompt in pieces."""
    m, following = Model.build(cfg, case.read, backend), np.roll(case.ids, -1, axis=1)
    states, further, trunk, head = m.new_states(case.batch), mtp.new_states(m, case.batch), [], []
    for piece in pieces:
        h, states = m.blocks(m.embed(backend.array(case.ids[:, piece])), states)
        o, further = mtp.predict(m, h, backend.array(following[:, piece]), further)
        trunk.append(backend.fetch(m.head(h)))
        head.append(backend.fetch(m.head(o)))
    return np.concatenate(trunk, axis=1), np.concatenate(head, axis=1)[:, :-1]


def check(backend, case: Case, cfg: Config, pieces: list[slice]) -> None:
    """Check both against the literal reading of each row, unless rounding decides a choice of experts."""
    trunk, head = answers(backend, case, cfg, pieces)
    size = terms(cfg, case.length)
    for row in range(case.batch):
        literal = Literal(cfg, case.read)
        for what, mine, true in zip(
            ("trunk", "head"), (trunk, head), literal.logits(case.ids[row]), strict=True
        ):
            if not counted(literal.margin <= tolerance(backend.dtype, size)):
                agree(mine[row], true, backend.dtype, size, f"{what}, row {row}", literal.stretch)


@given(drawn=odd(), cuts=CUTS)
def test_every_constant_is_obeyed_everywhere(backend, drawn, cuts):
    case, chosen = drawn
    check(backend, case, replace(case.cfg, **chosen), cut(case, cuts))


RICH = Case(layers="M*E-", mtp_layers="*E", n_group=3, batch=1, length=7, layer_norm_epsilon=0.2)


def test_the_constants_are_those_of_the_configuration():
    sizes = {f.name for f in fields(Config) if f.type in ("int", "int | None")} - set(CONSTANTS)
    assert {f.name for f in fields(Config)} == sizes | set(CONSTANTS) | NO_CONSTANTS


@pytest.mark.parametrize("name", CONSTANTS)
def test_each_constant_makes_a_difference_that_cannot_be_rounding(name):
    cfg = replace(
        RICH.cfg, **{name: menu[0] for name, menu in CONSTANTS.items()} | {"tie_word_embeddings": False}
    )
    cfg = replace(cfg, layer_norm_epsilon=0.2, topk_group=2)
    first = Literal(cfg, RICH.read).logits(RICH.ids[0])
    for value in CONSTANTS[name]:
        if value == getattr(cfg, name):
            continue
        other = Literal(replace(cfg, **{name: value}), RICH.read).logits(RICH.ids[0])
        for one, two in zip(first, other, strict=True):
            assert np.abs(one - two).max() > 30 * tolerance(np.float32, terms(cfg, 7)) * np.abs(one).max()

"""Checks of single layers: a mixer from an empty state, against readings of its equations in float64."""

from __future__ import annotations

import numpy as np

from refengine.conformance.cases import Case, agree
from refengine.conformance.checks import check, drawing, readings
from refengine.conformance.checks.attention import attention_size
from refengine.conformance.checks.experts import hiddens, lead
from refengine.spec.mixers import MIXERS


def layer_of(backend, case: Case, read=None):
    """Return what the mixer of layer 0 makes of seeded tokens, on the host, and the tokens."""
    h, kind = hiddens(backend, case), case.layers
    w, state = backend.weights(case.cfg, read or case.read), backend.new_state(kind, case.cfg, case.batch)
    return backend.result(MIXERS[kind](backend.give(h), w, case.cfg, state, None, backend.ops)[0]), h


def experts_size(case: Case) -> int:
    """Return the products in one output of a layer of experts."""
    c = case.cfg
    return c.hidden_size + c.expert_width + c.num_experts_per_tok * c.moe_intermediate_size + 17


@check("mamba2-mixer", drawing("M"), uses=("M",))
def the_mamba_layer_is_what_the_equations_say(backend, case):
    """Check projection, convolution, scan, gated norm and output of a Mamba layer, from an empty state."""
    y, h = layer_of(backend, case)
    c = case.cfg
    z, xBC, dt = np.split(h @ case.exact("in_proj.weight").T, np.cumsum(c.in_proj_widths)[:-1], axis=-1)
    xBC, _ = readings.conv(case, xBC, np.zeros((case.batch, c.conv_kernel - 1, c.conv_dim)))
    x, B, C = np.split(xBC, np.cumsum(c.conv_widths)[:-1], axis=-1)
    at = case.batch, case.length
    x, B, C = (
        x.reshape(*at, c.mamba_num_heads, -1),
        B.reshape(*at, c.n_groups, -1),
        C.reshape(*at, c.n_groups, -1),
    )
    S = np.zeros((case.batch, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size))
    u, _ = readings.scan(case, x, dt, B, C, S)
    u = u.reshape(z.shape)
    normed = readings.gated_norm(case, u, z, c.layer_norm_epsilon)
    gated = (u * z / (1 + np.exp(-z))).reshape(*at, c.n_groups, -1)
    stretch = float(1 / np.sqrt((gated**2).mean(-1) + c.layer_norm_epsilon).min())
    size = c.hidden_size + case.length * c.ssm_state_size + c.mamba_inner
    agree(y, normed @ case.exact("out_proj.weight").T, backend.dtype, size, stretch=max(1.0, stretch))


@check("attention-mixer", drawing("*"), uses=("*",))
def the_attention_layer_is_what_the_equations_say(backend, case):
    """Check projections, attention and output of an attention layer, from an empty cache."""
    y, h = layer_of(backend, case)
    at = case.batch, case.length
    q, k, v = ((h @ case.exact(f"{x}_proj.weight").T).reshape(*at, -1, case.head_dim) for x in "qkv")
    expected = readings.attention(q, k, v).reshape(*at, -1) @ case.exact("o_proj.weight").T
    agree(y, expected, backend.dtype, case.hidden_size + attention_size(case) + q[0, 0].size)


@check("experts-mixer", drawing("E"), uses=("E",))
def the_experts_are_what_the_equation_says(backend, case):
    """Check relu^2 and no gate (trap 5), and which parts read the latent, and which full width (trap 6)."""
    y, h = layer_of(backend, case)
    for b, t in np.argwhere(lead(backend, case, h)):
        agree(
            y[b, t],
            readings.experts(case, h[b, t]),
            backend.dtype,
            experts_size(case),
            f"row {b}, position {t}",
        )


@check("experts-mixer", drawing("E"), uses=("E",))
def renaming_the_experts_changes_nothing(backend, case):
    """Check experts that change places in their group, and groups that change places."""
    cfg = case.cfg
    by_group = case.rng(5).permutation(np.arange(cfg.n_routed_experts).reshape(cfg.n_group, -1))
    order = case.rng(6).permuted(by_group, axis=1).reshape(-1)

    def read(name):
        head, experts, tail = name.partition(".experts.")
        if experts:
            e, matrix = tail.split(".", 1)
            return case.read(f"{head}.experts.{order[int(e)]}.{matrix}")
        return case.read(name)[order] if ".gate." in name else case.read(name)

    (y, h), (renamed, _) = layer_of(backend, case), layer_of(backend, case, read)
    sure = lead(backend, case, h)
    agree(renamed[sure], y[sure], backend.dtype, experts_size(case))


@check("mlp-mixer", drawing("-"), uses=("-",))
def the_dense_layer_is_one_expert_that_every_token_reads(backend, case):
    """Check the dense layer."""
    y, h = layer_of(backend, case)
    expected = readings.mlp(h, case.exact("up_proj.weight"), case.exact("down_proj.weight"))
    agree(y, expected, backend.dtype, case.hidden_size + case.cfg.intermediate_size)

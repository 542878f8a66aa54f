"""Chapter 13. Mixers: the four kinds of layer, each composed of operations of chapter 12.

Every mixer has one signature, (hidden, w, cfg, state, lengths, ops) -> (its addition to the residual
stream, next state): hidden is the normalised stream, b l d (h in the chapters where h is not heads); w the
layer's weights by name; lengths the number of real positions of each row. Each ends with its only sum over
tensor-parallel ranks (chapter 22; the identity without ranks). With `record`, a mixer returns in place of
the next state a record of the call (chapter 9), from which `replay` computes the state after any number of
its positions.
"""

from __future__ import annotations

from refengine.spec.arrays import heads, merge, split


def mamba2(hidden, w, cfg, state, lengths, ops, record=False):  # b l d -> b l d
    """Return the output of a Mamba layer and its next state."""
    # PROJECT to z b l (h p), xBC b l c, dt b l h
    z, xBC, dt = split(ops.linear(hidden, w["in_proj.weight"]), cfg.in_proj_widths)
    # CONVOLVE, SCAN
    y, state = recur(xBC, dt, w, cfg, state, lengths, ops)  # b l h p
    # GATE
    y = ops.gated_rms_norm(merge(y), z, w["norm.weight"], cfg.layer_norm_epsilon, cfg.n_groups)  # b l (h p)
    # RETURN
    return ops.all_reduce(ops.linear(y, w["out_proj.weight"]), "M"), (xBC, dt) if record else state


def recur(xBC, dt, w, cfg, state, lengths, ops):  # b l c, b l h -> b l h p
    """Return the output of the scan at each position, and the next state."""
    # CONVOLVE
    xBC, tail = ops.causal_conv(xBC, w["conv1d.weight"], w["conv1d.bias"], state.tail, lengths)  # b l c
    # SCAN
    x, B, C = split(xBC, cfg.conv_widths)
    x, B, C = heads(x, cfg.mamba_num_heads), heads(B, cfg.n_groups), heads(C, cfg.n_groups)
    y, S = ops.ssd_scan(  # x, y b l h p   B, C b l g n   S b h p n
        x,
        dt,
        w["A_log"],
        B,
        C,
        w["D"],
        w["dt_bias"],
        state.read(),
        lengths,
        cfg.time_step_limit,
        cfg.chunk_size,
    )
    return y, state.after(tail, S, dt.shape[1] if lengths is None else lengths)


def attention(hidden, w, cfg, state, lengths, ops, record=False):  # b l d -> b l d
    """Return the output of an attention layer and its next cache."""
    # PROJECT
    q, k, v = split(ops.linear(hidden, w["qkv_proj"]), cfg.qkv_widths)
    q = heads(q, cfg.num_attention_heads)  # b l h e
    k, v = heads(k, cfg.num_key_value_heads), heads(v, cfg.num_key_value_heads)  # b l kv e
    # ATTEND
    y, state = ops.attention(q, k, v, state, lengths)  # b l h e
    # RETURN
    return ops.all_reduce(ops.linear(merge(y), w["o_proj.weight"]), "*"), (k, v) if record else state


def experts(hidden, w, cfg, state, lengths, ops, record=False):  # b l d -> b l d
    """Return the output of a layer of experts, which has no state."""
    # ROUTE, by the full-width input
    routing = ops.route(hidden, w["gate.weight"], w["gate.e_score_correction_bias"], cfg)
    # SHARED expert, at full width
    shared = ops.mlp(hidden, w["shared_experts.up_proj.weight"], w["shared_experts.down_proj.weight"])
    # ROUTED experts, in the latent width where there is one
    u = ops.linear(hidden, w["fc1_latent_proj.weight"]) if cfg.moe_latent_size else hidden  # b l x
    r = ops.experts(u, w["experts"], routing)  # b l x
    r = ops.linear(r, w["fc2_latent_proj.weight"]) if cfg.moe_latent_size else r  # b l d
    # RETURN
    return ops.all_reduce(r + shared, "E"), state


def mlp(hidden, w, cfg, state, lengths, ops, record=False):  # b l d -> b l d
    """Return the output of a dense layer, which has no state."""
    return ops.all_reduce(ops.mlp(hidden, w["up_proj.weight"], w["down_proj.weight"]), "-"), state


MIXERS = {"M": mamba2, "*": attention, "E": experts, "-": mlp}


def replay(kind, record, w, cfg, state, most, lengths, ops):
    """Return the state after lengths[b], `most` at most, of the positions of a recorded call."""
    if record is None:
        return state
    first, second = (part[:, :most] for part in record)
    if kind == "M":
        return recur(first, second, w, cfg, state, lengths, ops)[1]
    return state.append(first, second, lengths)

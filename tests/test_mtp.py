"""The prediction head. Its witness is the fact sheet read literally: transformers leaves the head out."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spec import mtp
from spec.tensors import groups, table
from tests.cases import CUTS, Case, agree, cases, cut, terms
from tests.test_attention import read_off as attention
from tests.test_route import read_off as route
from tests.truth import model, router_margin, truth

HEADS = cases(st.sampled_from(("M", "*", "M-")), max_length=12, mtp_layers="*E")


def run(backend, case: Case, pieces):
    """Trunk and head in pieces, as an engine would: row i reads the trunk's h[i] and the token after it."""
    m, next_ids = model(case, backend), np.roll(case.ids, -1, axis=1)
    states, head_states, out = m.new_states(case.batch), mtp.new_states(m, case.batch), []
    for piece in pieces:
        h, states = m.blocks(m.embed(backend.array(case.ids[:, piece])), states)
        o, head_states = mtp.predict(m, h, backend.array(next_ids[:, piece]), head_states)
        out.append(backend.fetch(m.head(o)))
    return np.concatenate(out, axis=1)


def norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def read_off(case: Case, row: int):
    """From the trunk's hidden after its final norm; returns logits, and how closely the head's router chose."""
    cfg, next_ids = case.cfg, np.roll(case.ids[row], -1)
    outer = {name: case.read(name).astype(np.float64) for name in (
        "backbone.embeddings.weight", "lm_head.weight", "mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.eh_proj.weight", "mtp.layers.0.norm.weight", "mtp.layers.1.norm.weight",
        "mtp.layers.1.final_layernorm.weight")}  # fmt: skip
    e = norm(outer["backbone.embeddings.weight"][next_ids], outer["mtp.layers.0.enorm.weight"])
    g = norm(truth(case, row).hidden, outer["mtp.layers.0.hnorm.weight"])
    v = np.concatenate([e, g], axis=-1) @ outer["mtp.layers.0.eh_proj.weight"].T
    h = norm(v, outer["mtp.layers.0.norm.weight"])
    q, k, value = ((h @ case.exact(f"{x}_proj.weight", "mtp.layers.0").T).reshape(1, len(h), -1, cfg.head_dim)
                   for x in "qkv")  # fmt: skip
    v = v + attention(q, k, value).reshape(len(h), -1) @ case.exact("o_proj.weight", "mtp.layers.0").T
    h = norm(v, outer["mtp.layers.1.norm.weight"])
    v = v + np.array([experts(case, token) for token in h])
    gate = [case.exact(key, "mtp.layers.1") for key in ("gate.weight", "gate.e_score_correction_bias")]
    o = norm(v, outer["mtp.layers.1.final_layernorm.weight"])
    return o @ outer["lm_head.weight"].T, router_margin(h, *gate, cfg)


def experts(case: Case, h):
    w = {key: case.exact(key + ".weight", "mtp.layers.1") for key in (
        "shared_experts.up_proj", "shared_experts.down_proj", "fc1_latent_proj", "fc2_latent_proj")
        if case.moe_latent_size or "latent" not in key}  # fmt: skip
    u, r = w["fc1_latent_proj"] @ h if case.moe_latent_size else h, 0
    for e, weight in route(case, h, "mtp.layers.1").items():
        up, down = (case.exact(f"experts.{e}.{side}_proj.weight", "mtp.layers.1") for side in ("up", "down"))
        r = r + weight * (down @ np.maximum(up @ u, 0) ** 2)
    r = w["fc2_latent_proj"] @ r if case.moe_latent_size else r
    return r + w["shared_experts.down_proj"] @ np.maximum(w["shared_experts.up_proj"] @ h, 0) ** 2


@given(case=HEADS, cuts=CUTS)
def test_the_head_in_pieces_is_what_the_fact_sheet_says(backend, case, cuts):
    """Trap 7: embedding first, then the hidden *after* the final norm; attention, experts, final norm, shared lm_head."""
    logits = run(backend, case, cut(case, cuts))
    for row in range(case.batch):
        (expected, margin), true = read_off(case, row), truth(case, row)
        if margin.min() > 1e-4:  # far from a tie in either precision
            size = terms(case.cfg, case.length)
            agree(logits[row], expected, backend.dtype, size, f"row {row}", true.stretch)


@given(case=HEADS)
def test_the_head_tells_the_embedding_from_the_hidden(backend, case):
    """Given each other's place they would give another answer, so their order cannot go wrong unseen."""
    m = model(case, backend)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    o, _ = mtp.predict(m, h, backend.array(case.ids), mtp.new_states(m, case.batch))
    block = m.weights["mtp.layers.0"] | {"eh_proj.weight": swapped_halves(backend, case)}
    other, _ = mtp.predict(
        replace(m, weights=m.weights | {"mtp.layers.0": block}), h, backend.array(case.ids),
        mtp.new_states(m, case.batch))  # fmt: skip
    assert np.abs(backend.fetch(o) - backend.fetch(other)).max() > 0.1  # both are of size 1


def swapped_halves(backend, case: Case):
    group = next(g for g in groups(table(case.cfg)) if g.name == "eh_proj.weight")
    halves = np.split(case.read("mtp.layers.0.eh_proj.weight"), 2, axis=1)
    return backend.place(group, [np.concatenate(halves[::-1], axis=1)])


@given(case=HEADS)
def test_one_head_runs_again_on_its_own_output(backend, case):
    """Drafting further: h := o, with the token just guessed; finite, and of the head's own shape each time."""
    m = model(case, backend)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    states = mtp.new_states(m, case.batch)
    for _ in range(3):
        o, states = mtp.predict(m, h[:, -1:], backend.array(case.ids[:, -1:]), states)
        assert backend.fetch(o).shape == (case.batch, 1, case.cfg.hidden_size)
        assert np.isfinite(backend.fetch(m.head(o))).all()
        h = o

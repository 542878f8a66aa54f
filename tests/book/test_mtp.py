"""The prediction head. Its witness is the fact sheet read literally: transformers leaves the head out."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import CUTS, Case, agree, cases, cut, terms
from refengine.conformance.truth import counted, model, router_margin, truth
from refengine.spec import mtp
from refengine.spec.numerics import tolerance
from refengine.spec.tensors import groups, table
from tests.book.test_attention import read_off as attention
from tests.book.test_experts import read_off as experts

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


def norm(case: Case, x, key: str):
    """One of the head's norms, or of its layers', with the case's epsilon."""
    weight = case.read(key + ".weight").astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + case.layer_norm_epsilon) * weight


def read_off(case: Case, row: int):
    """From the trunk's hidden after its final norm. Logits, and how closely the head's router chose."""

    def w(name):
        return case.read(name + ".weight").astype(np.float64)

    first, second = "mtp.layers.0", "mtp.layers.1"
    e = norm(case, w("backbone.embeddings")[np.roll(case.ids[row], -1)], f"{first}.enorm")
    g = norm(case, truth(case, row).hidden, f"{first}.hnorm")
    v = np.concatenate([e, g], axis=-1) @ w(f"{first}.eh_proj").T
    h = norm(case, v, f"{first}.norm")
    q, k, value = ((h @ w(f"{first}.mixer.{x}_proj").T).reshape(1, len(h), -1, case.head_dim) for x in "qkv")
    v = v + attention(q, k, value).reshape(len(h), -1) @ w(f"{first}.mixer.o_proj").T
    h = norm(case, v, f"{second}.norm")
    v = v + np.array([experts(case, token, second) for token in h])
    gate, bias = w(f"{second}.mixer.gate"), case.exact("gate.e_score_correction_bias", second)
    o = norm(case, v, f"{second}.final_layernorm")
    return o @ w("backbone.embeddings" if case.tied else "lm_head").T, router_margin(h, gate, bias, case.cfg)


@given(case=HEADS, cuts=CUTS)
def test_the_head_in_pieces_is_what_the_fact_sheet_says(backend, case, cuts):
    """Trap 7: embedding first, then the hidden *after* the final norm; attention, experts, norm, lm_head."""
    logits = run(backend, case, cut(case, cuts))
    for row in range(case.batch):
        (expected, margin), true, size = read_off(case, row), truth(case, row), terms(case.cfg, case.length)
        if not counted(margin.min() <= tolerance(backend.dtype, size)):
            agree(logits[row], expected, backend.dtype, size, f"row {row}", true.stretch)


@given(case=HEADS)
def test_the_head_tells_the_embedding_from_the_hidden(backend, case):
    """Given each other's place they would give another answer, so their order cannot go wrong unseen."""
    m = model(case, backend)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    o, _ = mtp.predict(m, h, backend.array(case.ids), mtp.new_states(m, case.batch))
    block = m.weights["mtp.layers.0"] | {"eh_proj.weight": swapped_halves(backend, case)}
    other, _ = mtp.predict(
        replace(m, weights=m.weights | {"mtp.layers.0": block}),
        h,
        backend.array(case.ids),
        mtp.new_states(m, case.batch),
    )
    assert np.abs(backend.fetch(o) - backend.fetch(other)).max() > 0.1  # both are of size 1


def swapped_halves(backend, case: Case):
    group = next(g for g in groups(table(case.cfg)) if g.name == "eh_proj.weight")
    halves = np.split(case.read("mtp.layers.0.eh_proj.weight"), 2, axis=1)
    return backend.place(group, [np.concatenate(halves[::-1], axis=1)])


@given(case=HEADS)
def test_one_head_runs_again_on_its_own_output(backend, case):
    """Drafting further: h := o, with the token just guessed."""
    m = model(case, backend)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    states = mtp.new_states(m, case.batch)
    for _ in range(3):
        o, states = mtp.predict(m, h[:, -1:], backend.array(case.ids[:, -1:]), states)
        assert backend.fetch(o).shape == (case.batch, 1, case.cfg.hidden_size)
        assert np.isfinite(backend.fetch(m.head(o))).all()
        h = o

"""Checks of whole models: prompts and decoding of every kind, the prediction head, a step, equal bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refengine.conformance.cases import Case, agree, cut, terms
from refengine.conformance.checks import check, expect, readings
from refengine.conformance.checks.laws import ALL, whole
from refengine.conformance.truth import agree_with_truth, counted, model, same_states, truth
from refengine.spec import mtp
from refengine.spec.model import Model
from refengine.spec.numerics import tolerance
from refengine.spec.tensors import groups, table

HEAD = (*ALL, "linear_pair")
FULL = Case(layers="MEM*EM-*E", length=23, n_groups=2)


def trunks(st) -> dict:
    """Return a strategy of models of a few layers that have a prediction head."""
    from refengine.conformance.strategies import cases

    return {"case": cases(st.sampled_from(("M", "*", "M-")), max_length=12, mtp_layers="*E")}


@check("model", whole(lambda st: {"prompt": st.integers(1, 15)}, max_length=16), uses=ALL,
       examples=({"case": FULL, "prompt": 11},
                 {"case": replace(FULL, length=70, batch=1), "prompt": 64}))  # fmt: skip
def a_prompt_and_then_one_token_at_a_time_is_the_sequence(backend, case, prompt):
    """Check prefill of rows of equal length, then decoding over the states, token by token."""
    m, first = model(case, backend), min(prompt, case.length)
    h, states = m.blocks(m.embed(backend.array(case.ids[:, :first])), m.new_states(case.batch))
    pieces = [backend.fetch(m.head(h))]
    for t in range(first, case.length):
        h, states = m.blocks(m.embed(backend.array(case.ids[:, t : t + 1])), states)
        pieces.append(backend.fetch(m.head(h)))
    logits = np.concatenate(pieces, axis=1)
    for row in range(case.batch):
        agree_with_truth(case, row, logits[row], backend.dtype)
        same_states(case, row, states, backend)


@check("model", whole(max_length=12), uses=ALL, examples=({"case": replace(FULL, batch=3)},))
def a_ragged_batch_decodes_as_each_row_would_alone(backend, case):
    """Check a prefill of rows of different lengths, and tokens after it at different positions."""
    m, n = model(case, backend), case.lengths
    x = m.embed(backend.array(case.ids))
    h, states = m.blocks(x, m.new_states(case.batch), backend.array(n))
    logits = backend.fetch(m.head(h))
    for row in range(case.batch):
        agree_with_truth(case, row, logits[row, : n[row]], backend.dtype, at=slice(0, int(n[row])))
    read = n.copy()
    for _ in range(2):
        more = np.minimum(case.length - read, 1)
        ids = np.take_along_axis(case.ids, np.minimum(read, case.length - 1)[:, None], axis=1)
        h, states = m.blocks(m.embed(backend.array(ids)), states, backend.array(more))
        logits = backend.fetch(m.head(h))
        for row in np.flatnonzero(more):
            at = slice(int(read[row]), int(read[row]) + 1)
            agree_with_truth(case, row, logits[row, :1], backend.dtype, at=at)
        read = read + more


def headed(backend, case: Case, pieces) -> np.ndarray:
    """Return the head's logits [b l v]: row i reads the trunk's h[i] and the token after it."""
    m, next_ids = model(case, backend), np.roll(case.ids, -1, axis=1)
    states, head_states, out = m.new_states(case.batch), mtp.new_states(m, case.batch), []
    for piece in pieces:
        h, states = m.blocks(m.embed(backend.array(case.ids[:, piece])), states)
        o, head_states = mtp.predict(m, h, backend.array(next_ids[:, piece]), head_states)
        out.append(backend.fetch(m.head(o)))
    return np.concatenate(out, axis=1)


def with_cuts(st) -> dict:
    """Return strategies of a model with a prediction head, and of where to cut its sequences."""
    from refengine.conformance.strategies import CUTS

    return trunks(st) | {"cuts": CUTS}


@check("prediction-head", whole(with_cuts), uses=HEAD)
def the_head_in_pieces_is_what_the_fact_sheet_says(backend, case, cuts):
    """Check that the head reads the embedding first, then the hidden after the final norm (trap 7)."""
    logits = headed(backend, case, cut(case, cuts))
    for row in range(case.batch):
        (expected, margin), true = readings.head(case, row), truth(case, row)
        size = terms(case.cfg, case.length)
        if not counted(margin.min() <= tolerance(backend.dtype, size)):
            agree(logits[row], expected, backend.dtype, size, f"row {row}", true.stretch)


@check("prediction-head", whole(trunks), uses=HEAD)
def the_head_tells_the_embedding_from_the_hidden(backend, case):
    """Check that the two halves of eh_proj, swapped, give another answer."""
    m = model(case, backend)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    ids = backend.array(case.ids)
    o, _ = mtp.predict(m, h, ids, mtp.new_states(m, case.batch))
    group = next(g for g in groups(table(case.cfg)) if g.name == "eh_proj.weight")
    halves = np.split(case.read("mtp.layers.0.eh_proj.weight"), 2, axis=1)
    swapped = backend.place(group, [np.concatenate(halves[::-1], axis=1)])
    block = m.weights["mtp.layers.0"] | {"eh_proj.weight": swapped}
    other, _ = mtp.predict(
        replace(m, weights=m.weights | {"mtp.layers.0": block}), h, ids, mtp.new_states(m, case.batch)
    )
    apart = np.abs(backend.fetch(o).astype(np.float64) - backend.fetch(other)).max()
    expect(apart > 0.1, "swapped halves of eh_proj give the same answer")  # both are of size 1


@check("prediction-head", whole(trunks), uses=HEAD)
def one_head_runs_again_on_its_own_output(backend, case):
    """Check drafting further: h := o, with the token just guessed."""
    m = model(case, backend)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    states = mtp.new_states(m, case.batch)
    for _ in range(3):
        o, states = mtp.predict(m, h[:, -1:], backend.array(case.ids[:, -1:]), states)
        shape = backend.fetch(o).shape
        expect(shape == (case.batch, 1, case.cfg.hidden_size), f"o has the shape {shape}")
        expect(np.isfinite(backend.fetch(m.head(o))).all(), "logits are not finite")
        h = o


def kept_heads(st) -> dict:
    """Return strategies: a model with a head, what it has read, and how many of the next are kept."""
    from refengine.conformance.strategies import cases

    case = cases(st.sampled_from(("M", "*", "M-")), max_length=6, mtp_layers="*E")
    return {"case": case, "read": st.integers(0, 3), "j": st.integers(0, 3)}


@check("prediction-head", whole(kept_heads), uses=HEAD)
def the_prediction_head_keeps_a_part_of_a_recorded_call_too(backend, case, read, j):
    """Check commit of the head's states."""
    m, next_ids = model(case, backend), backend.array(np.roll(case.ids, -1, axis=1))
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    read, states = min(read, case.length - 1), mtp.new_states(m, case.batch)
    if read:
        _, states = mtp.predict(m, h[:, :read], next_ids[:, :read], states)
    end = min(read + 3, case.length)
    o, records = mtp.predict(m, h[:, read:end], next_ids[:, read:end], states, record=True)
    kept = read + min(j, end - read)
    states = mtp.commit(m, states, records, [kept - read] * case.batch)
    pieces = [(o, slice(read, end))]
    if kept < case.length:
        o, _ = mtp.predict(m, h[:, kept:], next_ids[:, kept:], states)
        pieces.append((o, slice(kept, None)))
    for row in range(case.batch):
        (expected, margin), true = readings.head(case, row), truth(case, row)
        size = terms(case.cfg, case.length)
        if not counted(margin.min() <= tolerance(backend.dtype, size)):
            for o, at in pieces:
                logits = backend.fetch(m.head(o))[row]
                agree(logits, expected[at], backend.dtype, size, f"row {row}", true.stretch)


@check("step", whole(max_length=12), uses=ALL, needs=lambda backend: backend.step is not None,
       examples=({"case": replace(FULL, batch=3)},))  # fmt: skip
def a_step_in_one_call_is_a_step_of_the_verbs(backend, case):
    """Check logits and states of `Backend.step`, by turns with the verbs."""
    if backend.step is None:
        return
    m, states = model(case, backend), model(case, backend).new_states(case.batch)
    for t in range(case.length):
        if t % 3 == 2:
            h, states = m.blocks(m.embed(backend.array(case.ids[:, t : t + 1])), states)
            logits = backend.fetch(m.head(h))[:, 0]
        else:
            logits, states = backend.step(m, case.ids[:, t], states)
        for row in range(case.batch):
            at = slice(t, t + 1)
            agree_with_truth(case, row, np.asarray(logits)[row, None], backend.dtype, at=at)
    for row in range(case.batch):
        same_states(case, row, states, backend)


@check("determinism", whole(max_length=12), uses=ALL, examples=({"case": FULL},), share=0.5)
def two_runs_give_the_same_bits(backend, case):
    """Check logits of a prompt and of steps after it, bit by bit, in two runs of two models."""
    runs = []
    for _ in range(2):
        m = Model.build(case.cfg, case.read, backend)
        h, states = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
        found = [backend.fetch(m.head(h))]
        for t in range(min(3, case.length)):
            if backend.step is not None:
                logits, states = backend.step(m, case.ids[:, t], states)
            else:
                h, states = m.blocks(m.embed(backend.array(case.ids[:, t : t + 1])), states)
                logits = backend.fetch(m.head(h))
            found.append(np.array(logits))
        runs.append(found)
    for i, (one, other) in enumerate(zip(*runs, strict=True)):
        which = "of the prompt" if i == 0 else f"of step {i}"
        expect(one.tobytes() == other.tobytes(), f"logits {which} differ between two runs")

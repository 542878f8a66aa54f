"""Laws of the whole model: no answer depends on how a sequence was cut, or on who shared its batch."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.conformance.cases import CUTS, Case, agree, cases, cut, terms
from refengine.conformance.truth import agree_with_truth, counted, model, same_states, truth


@given(case=cases(), cuts=CUTS)
@example(case=Case(layers="M*-EM", length=9), cuts=range(9))  # one token at a time
def test_stopping_and_resuming_changes_nothing(backend, case, cuts):
    m = model(case, backend)
    states, pieces = m.new_states(case.batch), []
    for piece in cut(case, cuts):
        h, states = m.blocks(m.embed(backend.array(case.ids[:, piece])), states)
        pieces.append(backend.fetch(m.head(h)))
    logits = np.concatenate(pieces, axis=1)
    for row in range(case.batch):
        agree_with_truth(case, row, logits[row], backend.dtype)
        same_states(case, row, states, backend)


@given(case=cases(), cuts=CUTS, garbage=st.sampled_from((0.0, 1e3, -1e12)))
def test_padding_is_invisible(backend, case, cuts, garbage):
    """Rows of different lengths: beyond n[b] nothing enters a state, whatever stands there."""
    m, n, states = model(case, backend), case.lengths, model(case, backend).new_states(case.batch)
    for piece in cut(case, cuts):
        x = backend.fetch(m.embed(backend.array(case.ids[:, piece]))).copy()
        real = np.clip(n - piece.start, 0, x.shape[1])
        x[np.arange(x.shape[1]) >= real[:, None]] = garbage
        h, states = m.blocks(backend.array(x), states, backend.array(real))
        logits = backend.fetch(m.head(h))
        for row in range(case.batch):
            at = slice(piece.start, piece.start + real[row])
            agree_with_truth(case, row, logits[row, : real[row]], backend.dtype, at=at)
    for row in range(case.batch):
        same_states(case, row, states, backend, n[row])


@given(case=cases(), order=st.permutations(range(3)))
def test_the_company_in_a_batch_and_its_order_do_not_matter(backend, case, order):
    m, order = model(case, backend), [row for row in order if row < case.batch]
    h, _ = m.blocks(m.embed(backend.array(case.ids[order])), m.new_states(case.batch))
    for logits, row in zip(backend.fetch(m.head(h)), order, strict=True):
        agree_with_truth(case, row, logits, backend.dtype)


@given(case=cases(), middle=st.integers(0, 5))
def test_two_stages_of_some_layers_each_are_the_model(backend, case, middle):
    m, k, count = model(case, backend), min(middle, len(case.layers)), len(case.layers)
    states, x = m.new_states(case.batch), m.embed(backend.array(case.ids))
    h, after = m.blocks(x, states[:k], first=0, last=k) if k else (x, [])
    if k < count:
        h, rest = m.blocks(h, states[k:], first=k)
        assert len(after) + len(rest) == count
        for row in range(case.batch):
            agree_with_truth(case, row, backend.fetch(m.head(h))[row], backend.dtype)
            same_states(case, row, after + rest, backend)


@given(case=cases(batch=1))
def test_a_tap_sees_the_stream_after_each_layer(backend, case):
    m, seen = model(case, backend), []
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(1), tap=lambda i, x: seen.append((i, x)))
    assert [i for i, _ in seen] == list(range(len(case.layers)))
    true, size = truth(case, 0), terms(case.cfg, case.length)
    if not counted(true.sure(backend.dtype, size) < case.length):
        found = [(f"stream after layer {i}", x, true.stream[i]) for i, x in seen]
        for what, x, expected in [*found, ("hidden after the final norm", h, true.hidden)]:
            agree(backend.fetch(x)[0], expected, backend.dtype, size, what, true.stretch)


@given(case=cases(), data=st.integers(0, 999))
def test_the_head_of_some_rows_is_these_rows_of_the_head(backend, case, data):
    m = model(case, backend)
    h, _ = m.blocks(m.embed(backend.array(case.ids)), m.new_states(case.batch))
    rows = (data + np.arange(case.batch)) % case.length
    every, some = backend.fetch(m.head(h)), backend.fetch(m.head(h, backend.array(rows)))
    assert every.dtype == some.dtype == np.promote_types(backend.dtype, np.float32)
    agree(some, every[np.arange(case.batch), rows], backend.dtype, case.cfg.hidden_size)

"""Attention without positions: softmax over all that was said, wherever it stood."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import CUTS, Case, agree, cases, cut
from refengine.spec.attention import attention, attention_in_blocks
from refengine.spec.ops import numpy_backend

ATTENTIONS = cases("*")


def drawn(case: Case):
    """q, k, v"""
    at, e, (heads, kv) = (case.batch, case.length), case.head_dim, case.attention
    return [case.normal(i, *at, count, e) for i, count in enumerate((heads, kv, kv))]


def attend(backend, q, k, v, cache, n=None):
    q, k, v = backend.give(q, k, v)
    y, cache = backend.ops.attention(q, k, v, cache, None if n is None else backend.array(n))
    return backend.fetch(y), cache


def read_off(q, k, v):
    """One query at a time: it meets the keys up to its own, of the head that it and its neighbours share."""
    y = np.empty_like(q)
    for b, i, h in np.ndindex(q.shape[:3]):
        kv = h // (q.shape[2] // k.shape[2])
        weight = np.exp(k[b, : i + 1, kv] @ q[b, i, h] / np.sqrt(q.shape[3]))
        y[b, i, h] = weight @ v[b, : i + 1, kv] / weight.sum()
    return y


def size(case: Case) -> int:
    """Products in a score, and scores in a sum."""
    return case.cfg.head_dim + case.length


@given(case=ATTENTIONS, cuts=CUTS)
def test_attention_in_pieces_is_what_the_equation_says(backend, case, cuts):
    arrays = drawn(case)
    cache, pieces = backend.new_state("*", case.cfg, case.batch), []
    for piece in cut(case, cuts):
        y, cache = attend(backend, *(a[:, piece] for a in arrays), cache)
        pieces.append(y)
    agree(np.concatenate(pieces, axis=1), read_off(*arrays), backend.dtype, size(case))


@given(case=ATTENTIONS, cuts=CUTS)
def test_rows_of_different_lengths_do_not_see_padding(backend, case, cuts):
    """Beyond n[b] nothing is appended, so the next piece of a row that paused goes on from where it stood."""
    arrays, expected, n = drawn(case), read_off(*drawn(case)), case.lengths
    cache = backend.new_state("*", case.cfg, case.batch)
    for piece in cut(case, cuts):
        here = [a[:, piece].copy() for a in arrays]
        real = np.clip(n - piece.start, 0, here[0].shape[1])
        for a in here:
            a[np.arange(a.shape[1]) >= real[:, None]] = 1e6
        y, cache = attend(backend, *here, cache, real)
        for row, count in enumerate(real):
            at = slice(piece.start, piece.start + count)
            agree(y[row, :count], expected[row, at], backend.dtype, size(case), f"row {row}")


@given(case=ATTENTIONS, block=st.integers(1, 9), cuts=CUTS)
def test_attention_in_blocks_is_attention(case, block, cuts):
    arrays, n = drawn(case), case.lengths
    one, other = (numpy_backend(np.float64).new_state("*", case.cfg, case.batch) for _ in range(2))
    for piece in cut(case, cuts):
        here = [a[:, piece] for a in arrays]
        real = np.clip(n - piece.start, 0, here[0].shape[1])
        y, one = attention(*here, one, real)
        z, other = attention_in_blocks(*here, other, real, block=block)
        agree(z, y, np.float64, size(case))


@given(case=ATTENTIONS)
def test_the_order_of_the_past_does_not_matter(backend, case):
    """Trap 3: there is no position signal, so a shuffled past answers the last query alike."""
    q, k, v = drawn(case)
    order = np.append(case.rng(4).permutation(case.length - 1), case.length - 1)
    y, _ = attend(backend, q, k, v, backend.new_state("*", case.cfg, case.batch))
    shuffled, _ = attend(backend, q, k[:, order], v[:, order], backend.new_state("*", case.cfg, case.batch))
    agree(shuffled[:, -1], y[:, -1], backend.dtype, size(case))


@given(case=ATTENTIONS)
def test_very_large_scores_do_not_overflow(backend, case):
    """exp is taken of differences from the largest score; then the best key takes all."""
    q, k, v = drawn(case)
    y, _ = attend(backend, 1e4 * q, 1e4 * k, v, backend.new_state("*", case.cfg, case.batch))
    assert np.isfinite(y).all()
    b, i, h = 0, case.length - 1, case.cfg.num_attention_heads - 1
    scores = k[b, :, -1] @ q[b, i, h]
    best = np.sort(scores)[::-1]
    if case.length == 1 or best[0] - best[1] > 1e-3:  # far apart once multiplied by 1e8
        agree(y[b, i, h], v[b, scores.argmax(), -1], backend.dtype, size(case))

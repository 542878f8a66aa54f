"""Checks of the attention over a cache, against a reading of its equation in float64."""

from __future__ import annotations

import numpy as np

from refengine.conformance.cases import Case, agree, cut
from refengine.conformance.checks import check, drawing, expect, readings


def attention_inputs(backend, case: Case) -> list[np.ndarray]:
    """Return q, k, v."""
    at, e, (heads, kv) = (case.batch, case.length), case.head_dim, case.attention
    return [backend.exact(case.normal(i, *at, count, e)) for i, count in enumerate((heads, kv, kv))]


def attended(backend, q, k, v, cache, n=None):
    """Return y on the host, and the next cache."""
    q, k, v = backend.give(q, k, v)
    y, cache = backend.ops.attention(q, k, v, cache, None if n is None else backend.array(n))
    return backend.result(y, "y"), cache


def attention_size(case: Case) -> int:
    """Return the products in a score, and scores in a sum."""
    return case.cfg.head_dim + case.length


@check("attention", drawing("*", cuts=True), uses=("attention",))
def attention_in_pieces_is_what_the_equation_says(backend, case, cuts):
    """Check y over a cache that grows piece by piece."""
    arrays = attention_inputs(backend, case)
    cache, pieces = backend.new_state("*", case.cfg, case.batch), []
    for piece in cut(case, cuts):
        y, cache = attended(backend, *(a[:, piece] for a in arrays), cache)
        pieces.append(y)
    expected = readings.attention(*arrays)
    agree(np.concatenate(pieces, axis=1), expected, backend.dtype, attention_size(case))


@check("attention", drawing("*", cuts=True), uses=("attention",))
def rows_of_different_lengths_do_not_see_padding(backend, case, cuts):
    """Check that beyond n[b] nothing is appended, so that the next piece of a row continues there."""
    arrays, n = attention_inputs(backend, case), case.lengths
    expected = readings.attention(*arrays)
    cache = backend.new_state("*", case.cfg, case.batch)
    for piece in cut(case, cuts):
        here = [a[:, piece].copy() for a in arrays]
        real = np.clip(n - piece.start, 0, here[0].shape[1])
        for a in here:
            a[np.arange(a.shape[1]) >= real[:, None]] = 1e6
        y, cache = attended(backend, *here, cache, real)
        for row, count in enumerate(real):
            at = slice(piece.start, piece.start + count)
            agree(y[row, :count], expected[row, at], backend.dtype, attention_size(case), f"row {row}")


@check("attention", drawing("*"), uses=("attention",))
def the_order_of_the_past_does_not_matter(backend, case):
    """Check that there is no position signal: a shuffled past answers the last query alike (trap 3)."""
    q, k, v = attention_inputs(backend, case)
    order = np.append(case.rng(4).permutation(case.length - 1), case.length - 1)
    y, _ = attended(backend, q, k, v, backend.new_state("*", case.cfg, case.batch))
    shuffled, _ = attended(backend, q, k[:, order], v[:, order], backend.new_state("*", case.cfg, case.batch))
    agree(shuffled[:, -1], y[:, -1], backend.dtype, attention_size(case))


@check("attention", drawing("*"), uses=("attention",))
def very_large_scores_do_not_overflow(backend, case):
    """Check scores of 1e8: exp is taken of differences from the largest, and the best key takes all."""
    q, k, v = attention_inputs(backend, case)
    large = [backend.exact(1e4 * a) for a in (q, k)]
    y, _ = attended(backend, *large, v, backend.new_state("*", case.cfg, case.batch))
    expect(np.isfinite(y.astype(np.float64)).all(), "y is not finite")
    b, i, h = 0, case.length - 1, case.cfg.num_attention_heads - 1
    scores = large[1][b, :, -1] @ large[0][b, i, h] / 1e8
    best = np.sort(scores)[::-1]
    if case.length == 1 or best[0] - best[1] > 1e-3:  # far apart once multiplied by 1e8
        agree(y[b, i, h], v[b, scores.argmax(), -1], backend.dtype, attention_size(case))

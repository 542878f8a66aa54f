"""The norms, the convolution and the scan of the torch backend agree with the definition, at odd sizes."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec.ops import DEFINITION
from tests.support.torch_benches import lengths, on_all, placed, small, values

SIZE = st.integers(1, 37)
SEED = st.integers(0, 9999)


@on_all
@given(seed=SEED, b=st.integers(1, 3), l=SIZE, groups=st.integers(1, 4), width=SIZE, fresh=st.booleans())
def test_the_norms_see_the_sum_and_the_gate(how, seed, b, l, groups, width, fresh):
    here, c = how(), groups * width
    x, delta, w = values(how, seed, b, l, c), values(how, seed + 1, b, l, c), 1 + values(how, seed, c) / 5
    given_delta = None if fresh else here.give(delta)
    y, total = here.ops.rms_norm(here.give(x), given_delta, small(how, w), 1e-5)
    expected = DEFINITION.rms_norm(x, None if fresh else delta, w, 1e-5)
    how.near(here.fetch(total), expected[1], 1, "x + delta")
    how.near(here.fetch(y), expected[0], c, "rms_norm")
    y = here.ops.gated_rms_norm(here.give(x), here.give(delta), small(how, w), 1e-5, groups)
    how.near(here.fetch(y), DEFINITION.gated_rms_norm(x, delta, w, 1e-5, groups), width, "gated_rms_norm")


@on_all
@given(seed=SEED, b=st.integers(1, 3), l=SIZE, c=SIZE, k=st.integers(2, 5), ragged=st.booleans())
def test_the_convolution_and_its_tail(how, seed, b, l, c, k, ragged):
    here, n = how(), lengths(seed, b, l) if ragged else None
    x, tail = values(how, seed, b, l, c), values(how, seed, b, k - 1, c)
    w, bias = values(how, seed, c, 1, k) / 2, values(how, seed, c)
    weight = placed(how, w, name="conv1d.weight", precision="small")
    y, after = here.ops.causal_conv(here.give(x), weight, small(how, bias), here.give(tail), n_here(here, n))
    expected = DEFINITION.causal_conv(x, w, bias, tail, n)
    np.testing.assert_array_equal(here.fetch(after), expected[1])
    for row in range(b):
        real = l if n is None else n[row]
        how.near(here.fetch(y)[row, :real], expected[0][row, :real], k, "y")


def n_here(here, n):
    return None if n is None else here.array(n)


@on_all
@given(
    seed=SEED,
    b=st.integers(1, 3),
    l=st.integers(1, 70),
    g=st.integers(1, 3),
    r=st.integers(1, 3),
    chunk=st.sampled_from((1, 2, 11, 16, 64)),
    ragged=st.booleans(),
    limit=st.sampled_from(((0.0, math.inf), (0.1, 1.0))),
)
def test_the_scan_in_chunks_is_the_recurrence(how, seed, b, l, g, r, chunk, ragged, limit):
    here, (h, p, s), n = how(), (g * r, 5, 7), lengths(seed, b, l) if ragged else None
    x, dt = values(how, seed, b, l, h, p), values(how, seed, b, l, h)
    B, C = values(how, seed, b, l, g, s), values(how, seed + 1, b, l, g, s)
    A_log, D, bias = values(how, seed, h) + 1, values(how, seed + 2, h), values(how, seed + 3, h) - 3
    S = values(how, seed, b, h, p, s)
    here_S = here.array(S.astype(np.float32))
    y, after = here.ops.ssd_scan(
        *here.give(x, dt),
        small(how, A_log),
        *here.give(B, C),
        small(how, D),
        small(how, bias),
        here_S,
        n_here(here, n),
        limit,
        chunk,
    )
    expected = DEFINITION.ssd_scan(x, dt, A_log, B, C, D, bias, S, n, limit, chunk)
    assert here.fetch(after).dtype == np.float32
    how.near(here.fetch(after), expected[1], l + s, "S")
    for row in range(b):
        real = l if n is None else n[row]
        how.near(here.fetch(y)[row, :real], expected[0][row, :real], l + s, "y")
    np.testing.assert_array_equal(here.fetch(here_S), S.astype(np.float32), "the state that was given")

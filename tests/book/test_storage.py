"""Stored FP8 and bfloat16 agree with their definitions; random rounding to float16 is unbiased."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case
from refengine.spec.numerics import FP8, KV_DTYPES, Stored, random_bits, rounding_key, to_half
from refengine.spec.ops import DEFINITION, numpy_backend
from refengine.spec.quant import rounded_fp8
from refengine.spec.state import keyed, new_state

ALL = np.arange(2**13, dtype=np.uint32)  # each random number once
HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)


@given(st.floats(-65504, 65504, width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32))
def test_over_all_random_numbers_the_mean_is_the_number(x):
    """Each of the two float16 next to x is chosen in proportion to its nearness, to one part in 2^13."""
    x = np.float32(x)
    found = to_half(np.full(2**13, x), ALL).astype(np.float64)
    low, high = found.min(), found.max()
    unit = max(2.0**-24, 2.0 ** np.floor(np.log2(max(abs(float(x)), 2.0**-14))) * 2.0**-10)
    assert high - low in (0, unit) and low - unit * 2.0**-13 <= x <= high + unit * 2.0**-13
    assert abs(found.mean() - x) <= unit * 2.0**-12


def test_what_float16_holds_stays_and_the_rest_ends_at_its_limits():
    finite = HALVES[np.isfinite(HALVES)]
    for random in (0, 4095, 8191):
        bits = np.full(finite.shape, random, np.uint32)
        assert np.array_equal(
            to_half(finite.astype(np.float32), bits).view(np.uint16), finite.view(np.uint16)
        )
    large = np.array([1e6, -1e6, np.inf, -np.inf, 65519, np.nan], np.float32)
    found = to_half(large, np.full(6, 8191, np.uint32))
    assert found[:5].tolist() == [65504, -65504, 65504, -65504, 65504] and np.isnan(found[5])


def test_random_numbers_are_even_and_go_by_key_position_and_element():
    key, count = rounding_key([0, 1, 2**40, 2**40 + 1], 3), 4096
    bits = random_bits(key, np.array([5, 5, 5, 5]), count)
    again = random_bits(key[1:2], np.array([5]), count)
    assert np.array_equal(bits[1:2], again), "a row's numbers are its own, whatever stands beside it"
    others = [
        random_bits(rounding_key([1], 4), np.array([5]), count),
        random_bits(key[1:2], np.array([6]), count),
        bits[0:1], bits[2:3], bits[3:4],
    ]  # fmt: skip
    for other in others:
        assert abs(np.corrcoef(bits[1], other[0])[0, 1]) < 5 / count**0.5
    steps = random_bits(key[:1], np.array([0]), 2**16)[0].astype(np.float64) / 2**13
    assert abs(steps.mean() - 0.5) < 4 * (1 / 12 / steps.size) ** 0.5
    for lag in (1, 2, 3, 8, 64, 128):
        assert abs(np.corrcoef(steps[lag:], steps[:-lag])[0, 1]) < 5 / steps.size**0.5, lag
    many = np.stack([random_bits(key[:1], np.array([t]), 8)[0] for t in range(2000)]).astype(np.float64)
    assert abs(np.corrcoef(many.T) - np.eye(8)).max() < 5 / 2000**0.5, "nor do positions repeat each other"
    assert abs(np.corrcoef(many[1:, 0], many[:-1, 0])[0, 1]) < 5 / 2000**0.5


def scanned(state, amount: float, length: int = 1):
    """Return the state after `length` positions that only add `amount` to each number of S."""
    (b, h, p, n), one = state.S.shape, np.float32
    dt, still = np.zeros((b, length, h), one), np.full(h, -1e4, one)
    B, x = np.ones((b, length, 1, n), one), np.full((b, length, h, p), amount, one)
    zero, limits = np.zeros(h, one), (1.0, 1.0)
    _, S = DEFINITION.ssd_scan(x, dt, still, B, B, zero, zero, state.read(), None, limits, 8)
    return state.after(state.tail, S, length)


def test_additions_below_half_a_unit_add_up():
    """Rounding to nearest loses all of them; random rounding loses none on average, and sequences differ."""
    state = new_state("M", Case(layers="M", heads_per_group=8).cfg, 2, np.float32, ssm="float16")
    state = keyed([replace(state, S=np.ones_like(state.S))], [7, 8])[0]
    for _ in range(60):
        state = scanned(state, 0.2 * 2.0**-10)
    units = (state.S.astype(np.float64) - 1) * 2**10
    assert abs(units.mean() - 12) < 4 * (60 * 0.2 * 0.8 / units.size) ** 0.5
    assert not np.array_equal(state.S[0], state.S[1]) and state.position.tolist() == [60, 60]


def test_a_state_in_float16_is_the_same_in_any_company_and_on_every_run():
    case = Case(layers="M", batch=3)
    empty = new_state("M", case.cfg, 3, np.float32, ssm="float16")
    batch = keyed([empty], [3, 4, 5])[0]
    alone = keyed([new_state("M", case.cfg, 1, np.float32, ssm="float16")], [4])[0]
    for amount in (0.3, 0.7, 1e-5, 123.4):
        batch, alone = scanned(batch, amount), scanned(alone, amount)
    assert np.array_equal(batch.take([1]).S, alone.S)
    assert np.array_equal(batch.put([0], alone).take([0]).S, alone.S)
    moved = batch.put([0], alone)
    assert np.array_equal(scanned(moved, 0.1).S[0], scanned(moved, 0.1).S[1]), "key and position move along"


@pytest.mark.parametrize("scale", [1.0, 0.03, 7.5])
def test_fp8_is_that_of_packed_weights_with_its_scale(scale):
    x = np.concatenate([np.random.default_rng(0).normal(0, 90, 4000), [0, -0.0, 1e9, -1e9]]).astype(
        np.float32
    )
    form = Stored(FP8, scale, scale)
    kept = form.narrow(x, scale)
    assert np.array_equal(form.wide(kept, scale, np.float32), rounded_fp8(x, scale))
    assert form.narrow(kept, scale) is kept, "what is stored already stays as it is"
    assert np.isnan(form.wide(form.narrow(np.float32([np.nan]), scale), scale, np.float32))


@given(kv=st.sampled_from(list(KV_DTYPES)), seed=st.integers(0, 99), cut=st.integers(1, 8))
def test_a_stored_cache_is_attention_over_rounded_keys_and_values(kv, seed, cut):
    case = Case(layers="*", seed=seed, length=9)
    cfg, scales = case.cfg, (0.02, 0.5) if kv == "fp8" else (1.0, 1.0)
    widths = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads
    q, k, v = (case.normal(i, case.batch, 9, width, cfg.head_dim) for i, width in enumerate(widths))
    backend = numpy_backend(np.float64, ops=DEFINITION, kv=kv)
    cache = backend.new_state("*", cfg, case.batch).scaled(*scales)
    parts = [(q[:, :cut], k[:, :cut], v[:, :cut]), (q[:, cut:], k[:, cut:], v[:, cut:])]
    found = []
    for part in parts:
        y, cache = backend.ops.attention(*part, cache)
        found.append(y)
    form = Stored(KV_DTYPES[kv], *scales)
    near = [
        form.wide(form.narrow(a, scale), scale, np.float64) for a, scale in zip((k, v), scales, strict=True)
    ]
    plain = new_state("*", cfg, case.batch, np.float64)
    expected, _ = DEFINITION.attention(q, *near, plain)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=1e-12, atol=1e-12)
    assert cache.k.dtype == KV_DTYPES[kv]


def test_scales_of_a_layer_are_those_of_the_model():
    from refengine.spec.model import Model

    case = Case(layers="*M*")
    built = Model.build(case.cfg, case.read, numpy_backend(kv="fp8"))
    first, _, last = replace(built, scales={"layers.2": (0.5, 2.0)}).new_states(1)
    assert (first.stored.k_scale, last.stored.k_scale, last.stored.v_scale) == (1.0, 0.5, 2.0)
    assert first.k.dtype == np.dtype(ml_dtypes.float8_e4m3fn)

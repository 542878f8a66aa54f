"""Keys and values stored on CUDA in another dtype than the activations are rounded as in the definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.backends.cuda import cuda_backend
from refengine.conformance.cases import Case
from refengine.spec.numerics import FP8, KV_DTYPES, Stored
from tests.support.cuda_device import device  # noqa: F401
from tests.support.stored import check_cache, check_scan


@pytest.mark.parametrize("kv", KV_DTYPES)
@given(seed=st.integers(0, 99), cut=st.sampled_from((1, 3, 40)), ragged=st.booleans())
def test_a_stored_cache_is_attention_over_rounded_keys_and_values(device, kv, seed, cut, ragged):  # noqa: F811
    """Steps and short calls use parts of the context; 40 positions of 16 heads use tiles of queries."""
    case = Case(layers="*", seed=seed, length=cut + 2, attention=((6, 2), (16, 1))[seed % 2])
    check_cache(cuda_backend("float32", device, kv=kv), kv, case, cut, ragged, near=4.0)


def test_fp8_has_the_bytes_of_the_definition(device):  # noqa: F811
    """All magnitudes of E4M3, values between them, ties, and the limits."""
    cfg = Case(layers="*", attention=(6, 2)).cfg
    codes = np.arange(127, dtype=np.uint8).view(FP8).astype(np.float32)
    x = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, codes * 1.01, [500, 1e9, 1e-9, -0.0]]).astype(
        np.float32
    )
    x = np.resize(np.concatenate([x, -x]), (1, 40, 2, 10))
    cache = cuda_backend("float32", device, kv="fp8").new_state("*", cfg, 1).scaled(1.0, 0.25)
    given = device.from_host(x)
    cache = cache.append(given, given)
    for part, scale in ((cache.k, 1.0), (cache.v, 0.25)):
        found = device.to_host(part[:, :, :40]).swapaxes(1, 2)
        np.testing.assert_array_equal(found, Stored(FP8).narrow(x, scale).view(np.uint8))


def test_activations_in_bfloat16_read_a_cache_in_fp8(device):  # noqa: F811
    case = Case(layers="*", length=6)
    backend = cuda_backend("bfloat16", device, kv="fp8")
    q, k, v = (
        case.normal(i, 2, 6, width, 10).astype(KV_DTYPES["bfloat16"]) for i, width in enumerate((6, 2, 2))
    )
    y, _ = backend.ops.attention(*map(backend.array, (q, k, v)), backend.new_state("*", case.cfg, 2))
    y = backend.fetch(y).astype(np.float32)
    wide, _ = cuda_backend("float32", device, kv="fp8").ops.attention(
        *map(device.from_host, (a.astype(np.float32) for a in (q, k, v))),
        cuda_backend("float32", device, kv="fp8").new_state("*", case.cfg, 2),
    )
    np.testing.assert_allclose(y, device.to_host(wide), rtol=0.05, atol=0.05)


@given(seed=st.integers(0, 99), n=st.sampled_from((4, 5, 16)))
def test_a_state_in_float16_is_that_of_the_definition(device, seed, n):  # noqa: F811
    """By steps and by chunks, one at a time and packed by fours, with the random numbers of the book."""
    case = Case(layers="M", seed=seed, ssm_state_size=n, mamba_head_dim=(7, 8)[seed % 2])
    check_scan(cuda_backend("float32", device, state="float16"), case)

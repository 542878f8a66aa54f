"""States stored in fewer bits on PyTorch are rounded as in the definition, by the loops and by PyTorch."""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.conformance.cases import Case
from refengine.spec.model import Model
from refengine.spec.numerics import FP8, KV_DTYPES, Stored, random_bits, rounding_key, to_half
from tests.support.stored import check_cache, check_scan

torch = pytest.importorskip("torch", reason="the torch backend needs: pip install 'refengine[torch]'")
from refengine.backends.pytorch import state as here  # noqa: E402
from refengine.backends.pytorch import torch_backend  # noqa: E402

on_both = pytest.mark.parametrize("compiled", [True, False], ids=["loops", "library"])
made = lru_cache(torch_backend)


@on_both
@pytest.mark.parametrize("kv", KV_DTYPES)
@given(seed=st.integers(0, 99), cut=st.integers(1, 16), ragged=st.booleans())
def test_a_stored_cache_is_attention_over_rounded_keys_and_values(compiled, kv, seed, cut, ragged):
    case = Case(layers="*", seed=seed, attention=((6, 2), (5, 1))[seed % 2])
    check_cache(made(kv=kv, compiled=compiled), kv, case, cut, ragged)


def test_random_rounding_has_the_numbers_of_the_definition():
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 5)) * 10.0 ** np.arange(-8, 7, 3)
    x = x.astype(np.float32)
    key, position = rounding_key([1, 2**40, 7], 5), np.array([0, 9, 2**33])
    expected = to_half(x, random_bits(key, position, 40).reshape(x.shape))
    found = here.to_half(
        torch.from_numpy(x), *(torch.from_numpy(a.astype(np.int64)) for a in (key, position))
    )
    np.testing.assert_array_equal(found.numpy(), expected)


@on_both
@given(seed=st.integers(0, 99))
def test_a_state_in_float16_is_that_of_the_definition(compiled, seed):
    check_scan(made(ssm="float16", compiled=compiled), Case(layers="M", seed=seed))


def test_fp8_has_the_bytes_of_the_definition():
    x = np.random.default_rng(0).normal(0, 60, 4000).astype(np.float32)
    cache = made(kv="fp8").new_state("*", Case(layers="*").cfg, 1)
    expected = Stored(FP8).narrow(x, 0.3).view(np.uint8)
    np.testing.assert_array_equal(cache.narrow(torch.from_numpy(x), 0.3).numpy(), expected)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("kv, ssm", [("bfloat16", None), ("fp8", "float16")])
def test_a_whole_step_is_the_verbs_one_after_another(kv, ssm, units, monkeypatch):
    """With bfloat16 `units` of the processor the verbs round inputs that the loops do not."""
    from refengine.backends.cpu.steps import plain

    monkeypatch.setattr("refengine.backends.pytorch.products.has_bfloat16_units", lambda: units)
    case = Case(layers="M*E-M*", batch=3, length=9)
    m = Model.build(case.cfg, case.read, made("bfloat16", kv=kv, ssm=ssm))
    if m.backend.step is None:
        pytest.skip("no C++ compiler")
    give = m.backend.array
    _, states = m.blocks(m.embed(give(case.ids)), m.new_states(3), give(case.lengths))
    one, other = states, [s and s.take([0, 1, 2]) for s in states]
    for token in case.rng(4).integers(0, case.cfg.vocab_size, (4, 3)):
        (a, one), (b, other) = m.backend.step(m, token, one), plain(m, give(token), other)
        if not units:
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2)
        apart = np.sqrt(np.square(np.subtract(a, b, dtype=np.float64)).mean() / np.square(b).mean())
        assert apart <= (0.06 if kv == "fp8" else 0.04)

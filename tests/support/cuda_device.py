"""Devices for the tests of the CUDA backend, as fixtures: a test module imports those it uses.

device      the emulator in its fast mode; under `pytest -m gpu` the real device too
sanitized   the emulator with AddressSanitizer + UndefinedBehaviorSanitizer, and with ThreadSanitizer
perturbed   the emulator with approximate functions off by a few units and without denormal numbers

Tests of one kernel use the last two in the thorough tier; those of the whole model, which set the parameter
themselves (`on_address`, `on_perturbed`), in the default tier too.
"""

from __future__ import annotations

from functools import lru_cache

import pytest

from tools.cuda.emulator import EmulatedDevice, compiler

needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="the CUDA emulator needs clang++ 19 (apt install clang-19 llvm-19)"
)


@lru_cache
def emulated(mode: str = "fast", perturb: bool = False) -> EmulatedDevice:
    return EmulatedDevice(mode=mode, perturb=perturb)


@lru_cache
def real():
    """Return the first CUDA device; without one, skip the test with the device's own message."""
    from refengine.backends.cuda.device import CupyDevice
    from refengine.spec.config import InputError

    try:
        return CupyDevice()
    except InputError as error:
        pytest.skip(str(error))


EMULATED = pytest.param("emulated", marks=needs_compiler)
GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="session", params=[EMULATED, GPU])
def device(request):
    return emulated() if request.param == "emulated" else real()


THOROUGH = [needs_compiler, pytest.mark.thorough]
ADDRESS = pytest.param("address", marks=needs_compiler)
THREAD = pytest.param("thread", marks=THOROUGH)
PERTURBED = pytest.param("perturbed", marks=needs_compiler)


@pytest.fixture(scope="session", params=[pytest.param("address", marks=THOROUGH), THREAD])
def sanitized(request):
    return emulated(request.param)


@pytest.fixture(scope="session", params=[pytest.param("perturbed", marks=THOROUGH)])
def perturbed():
    return emulated(perturb=True)


on_address = pytest.mark.parametrize("sanitized", [ADDRESS, THREAD], indirect=True)
on_perturbed = pytest.mark.parametrize("perturbed", [PERTURBED], indirect=True)

"""Devices for the tests of the CUDA backend, as fixtures: a test module imports those it uses.

device      the emulator in its fast mode; under `pytest -m gpu` the real device too
sanitized   the emulator with AddressSanitizer + UndefinedBehaviorSanitizer, and with ThreadSanitizer
perturbed   the emulator with approximate functions off by a few units and without denormal numbers
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
    """The first CUDA device; the test is skipped, with the device's own sentence, where there is none."""
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


CHECKED = [
    pytest.param("address", marks=needs_compiler),
    pytest.param("thread", marks=[needs_compiler, pytest.mark.thorough]),
]


@pytest.fixture(scope="session", params=CHECKED)
def sanitized(request):
    return emulated(request.param)


@pytest.fixture(scope="session", params=[pytest.param("perturbed", marks=needs_compiler)])
def perturbed():
    return emulated(perturb=True)

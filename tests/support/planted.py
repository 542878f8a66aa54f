"""Launches of the planted kernels of tools/cuda/emulator, for the tests of the emulator."""

from pathlib import Path

import numpy as np
import pytest

import tools.cuda.emulator
from tools.cuda.emulator import EmulatedDevice, EmulationError

PLANTED = Path(tools.cuda.emulator.__file__).parent / "planted"
X = np.arange(1, 65, dtype=np.float32)


def run(kernel, mode="fast", grid=(1,), shared=0, seed=0, x=X, room=64):
    device = EmulatedDevice(seed, mode, kernels=PLANTED)
    y = device.empty((room,), "float32")
    device.launch("planted", kernel, grid, (64,), (device.from_host(x), y), shared)
    return device.to_host(y)


def found(kernel, mode, **how) -> str:
    with pytest.raises(EmulationError) as error:
        run(kernel, mode, **how)
    return str(error.value)


MODES = pytest.mark.parametrize("mode", ["fast", "address", "thread"])


def launched(kernel, *args, grid=(1,), block=(64,), shared=0, mode="fast", room=(64, "float32")):
    """Return the values that a kernel writes into its first argument."""
    device = EmulatedDevice(mode=mode, kernels=PLANTED)
    y = device.zeros((room[0],), room[1])
    given = [device.from_host(a) if isinstance(a, np.ndarray) else a for a in args]
    device.launch("planted", kernel, grid, block, [y, *given], shared)
    return device.to_host(y)

"""A device whose memory takes space only where it is written, for arrays larger than any machine."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from tools.cuda.emulator import EmulatedDevice

NOT_RESERVED = 0x4000  # MAP_NORESERVE of Linux


class Sparse:
    """Memory that is zero until it is written."""

    def __init__(self, nbytes: int):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NOT_RESERVED
        self.bytes = np.frombuffer(mmap.mmap(-1, max(1, nbytes), flags=flags), np.uint8)
        self.ptr = self.bytes.ctypes.data

    def intact(self) -> bool:
        return True


class SparseDevice(EmulatedDevice):
    def allocate(self, nbytes: int) -> Sparse:
        return Sparse(nbytes)


@pytest.fixture(scope="module")
def device():
    try:
        Sparse(1 << 36)
    except OSError:
        pytest.skip("this machine gives no memory that it does not have")
    return SparseDevice()

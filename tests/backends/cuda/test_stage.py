"""Copies from and to the host use pinned buffers, and no buffer is overwritten while it is read.

The runtime here delays a copy until a wait for it, as a device may.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from refengine.backends.cuda import device as module


class Queue:
    """A stream with copies that were requested and are not done yet."""

    ptr = 0

    def __init__(self):
        self.waiting = []

    def synchronize(self, count=None):
        count = len(self.waiting) if count is None else count
        for copy in self.waiting[:count]:
            copy()
        del self.waiting[:count]


class Event:
    def __init__(self, **how):
        self.copies = []

    def record(self, queue):
        self.queue, self.copies = queue, list(queue.waiting)

    def synchronize(self):
        pending = [copy for copy in self.copies if copy in self.queue.waiting]
        if pending:
            self.queue.synchronize(self.queue.waiting.index(pending[-1]) + 1)


@pytest.fixture
def stage(monkeypatch):
    monkeypatch.setattr(module, "STAGE", 16)
    queue, pinned = Queue(), []

    def alloc(nbytes):
        memory = (ctypes.c_uint8 * nbytes)()
        memory.ptr = ctypes.addressof(memory)
        pinned.append(range(memory.ptr, memory.ptr + nbytes))
        return memory

    def memcpy(to, source, nbytes, kind, stream):
        host = source if kind == "up" else to
        assert any(host in part and host + nbytes - 1 in part for part in pinned), "memory that is not pinned"
        queue.waiting.append(lambda: ctypes.memmove(to, source, nbytes))

    runtime = SimpleNamespace(memcpyHostToDevice="up", memcpyDeviceToHost="down", memcpyAsync=memcpy)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, alloc_pinned_memory=alloc, Event=Event))
    return module.Stage(cupy, queue), queue


@pytest.mark.parametrize("length", [0, 1, 16, 17, 100])
def test_what_goes_to_the_device_and_back_is_what_was_sent(stage, length):
    stage, queue = stage
    sent = np.arange(length, dtype=np.uint8)
    there, back = np.zeros(length, np.uint8), np.zeros(length, np.uint8)
    stage.upload(there.ctypes.data, sent)
    queue.synchronize()
    assert np.array_equal(there, sent)
    stage.download(back, there.ctypes.data)
    assert np.array_equal(back, sent)

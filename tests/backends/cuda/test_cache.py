"""The attention cache on CUDA supports forks, changes of rows, and a captured step."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from refengine.backends.cuda.attention import Attention
from refengine.spec.attention import attention
from tests.support.cuda_attention import Case
from tests.support.cuda_device import device  # noqa: F401
from tests.support.cuda_verbs import exact, on_both


@on_both
@given(
    seed=st.integers(0, 9999), twice=st.booleans(), pieces=st.sampled_from(((1,), (30,), (4, 1), (40, 12)))
)
def test_forks_and_slots_of_a_cache_do_not_see_each_other(device, build, seed, pieces, twice):  # noqa: F811
    """Both forks continue from the same buffer, one of them twice in a row; then their rows are exchanged."""
    case, more = Case(build, seed, pieces=pieces), Case(build, seed + 1, pieces=(1, 2, 3))
    here, known = case.check(device, ragged=True)
    one, other = (here, known.fork()), (here.fork(), known.fork())
    one = case.step(device, one, more.qkv[:, :1])
    if twice:
        one = case.step(device, one, more.qkv[:, 1:3])
    other = case.step(device, other, more.qkv[:, 3:])
    mixed = [a.put([0], b.take([1])) for a, b in zip(one, other, strict=True)]
    case.step(device, mixed, more.qkv[:, :2])
    case.step(device, one, more.qkv[:, 3:5])


@on_both
def test_a_buffer_that_nobody_shares_is_not_copied_to_append(device, build):  # noqa: F811
    """Neither a new buffer nor one whose rows left or joined is copied; that of a fork is copied."""
    case = Case(build, 1, pieces=(5,))
    here, _ = case.check(device)
    for cache in (here, here.take([1]), here.put([0], here.take([1]))):
        assert cache.reserve(1) is cache and cache.fork().reserve(1).k is cache.k
    fork = here.fork()
    assert here.advanced(1).reserve(1).k is here.k
    assert fork.reserve(1).k is not here.k


class Recorder:
    """A device that repeats its launches with the same arguments, as a captured graph does."""

    def __init__(self, device):  # noqa: F811
        self.device, self.launches = device, []

    def __getattr__(self, name):
        return getattr(self.device, name)

    def launch(self, *how):
        self.launches.append(how)
        self.device.launch(*how)

    def replay(self):
        for how in self.launches:
            self.device.launch(*how)


@on_both
def test_a_captured_step_finds_the_next_position_by_itself(device, build):  # noqa: F811
    case = Case(build, 0, r=4, e=32, pieces=(6, *[1] * 9))
    here, known = case.step(device, case.caches(device), case.qkv[:, :6], np.array([6, 2], np.int32))
    static, recorder = device.from_host(case.qkv[:, :1]), Recorder(device)
    for i in range(6, 15):
        device.copy(device.from_host(np.ascontiguousarray(case.qkv[:, i : i + 1])), static)
        reserved = here.reserve(1)
        if recorder.launches:
            assert reserved is here, "there is room, so nothing has moved"
            recorder.replay()
            here = here.advanced(1)
        else:
            y, here = Attention(recorder, build.defines).attention(*case.heads(static), reserved)
        expected, known = attention(*exact(*case.heads(case.qkv[:, i : i + 1])), known)
        build.near(device.to_host(y), expected, np.full_like(expected, 4), products=True)
    assert list(device.to_host(here.length)) == [15, 11]
    assert here.most == 15

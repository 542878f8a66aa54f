"""The memory of a result is reused only after the last array in it is freed."""

import threading

import numpy as np
import pytest

from refengine.backends.cpu import native
from refengine.backends.cpu.memory import LARGE, Kept, empty
from refengine.backends.cpu.verbs import Verbs


def at(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_lent_again_when_the_last_view_is_gone():
    kept = Kept()
    array = empty((2, LARGE), kept)
    assert array.shape == (2, LARGE) and array.dtype == np.float32 and array.flags.c_contiguous
    place, view = at(array), array[1, ::2].reshape(-1, 2)
    del array
    assert not kept.free
    view[:] = 7
    other = empty((2, LARGE), kept)
    assert at(other) != place and (view == 7).all()
    del view
    assert at(empty((2 * LARGE,), kept)) == place
    assert kept.size == 2 * LARGE


def test_no_memory_is_lent_that_is_much_too_large_and_little_is_kept():
    kept = Kept(most=5 * LARGE)
    arrays = [empty((3 * LARGE,), kept), empty((LARGE,), kept), empty((4 * LARGE,), kept)]
    arrays.clear()
    assert kept.size == sum(memory.size for memory in kept.free) <= kept.most
    sizes = [memory.size for memory in kept.free]
    empty((LARGE // 2,), kept)
    assert [memory.size for memory in kept.free] == sizes
    huge = empty((9 * LARGE,), kept)
    del huge
    assert kept.size == 0 and not kept.free


def test_threads_never_share_memory():
    kept, wrong = Kept(), []

    def work(number: int):
        for _ in range(300):
            mine = [empty((LARGE + i,), kept) for i in range(3)]
            for array in mine:
                array[:] = number
            if not all((array == number).all() for array in mine):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_array_that_is_freed_inside_take_does_not_wait_for_it():
    """As by the garbage collector, which runs at any allocation."""
    kept, arrays = Kept(), []
    arrays.append(empty((LARGE,), kept))
    with kept.lock:
        freeing = threading.Thread(target=arrays.clear, daemon=True)
        freeing.start()
        freeing.join(60)
        assert not freeing.is_alive() and not arrays
    assert not kept.free and kept.size == 0


@pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
def test_a_result_stays_as_it_was_when_others_are_computed():
    verbs, rng = Verbs(native.load(), 2), np.random.default_rng(0)
    x, w = rng.standard_normal((300, 200), np.float32), rng.standard_normal((150, 200), np.float32)
    first = verbs.linear(x, w)
    before = first.copy()
    for _ in range(5):
        verbs.linear(-x, w)
    assert np.array_equal(first, before)

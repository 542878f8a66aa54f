"""Device arrays agree with NumPy arrays, on the emulator and, under -m gpu, on a real device."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.backends.cuda.array import DTYPES
from refengine.backends.cuda.kernel import KERNELS, SCALARS, allowed, signatures
from tests.support.cuda_device import device, needs_compiler  # noqa: F401
from tools.cuda.emulator import EmulatedDevice, EmulationError

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
DTYPE = st.sampled_from(sorted(DTYPES))


def numbers(shape, dtype="float32"):
    """Return numbers that are all different, as far as the dtype has enough values."""
    return np.arange(1, math.prod(shape) + 1).reshape(shape).astype(DTYPES[dtype])


@st.composite
def keys(draw, shape):
    """Return integers and slices, for some or all axes."""
    key = []
    for length in shape[: draw(st.integers(0, len(shape)))]:
        if length and draw(st.booleans()):
            key.append(draw(st.integers(-length, length - 1)))
        else:
            start, stop = draw(st.integers(-6, 6)), draw(st.integers(-6, 6))
            key.append(slice(start, stop, draw(st.sampled_from((1, 2)))))
    return tuple(key)


@given(shape=SHAPES, dtype=DTYPE, data=st.data())
def test_a_view_is_what_numpy_says(device, shape, dtype, data):  # noqa: F811
    a = numbers(shape, dtype)
    x, key = device.from_host(a), data.draw(keys(shape))
    part = x[key]
    np.testing.assert_array_equal(device.to_host(part), a[key])
    again = data.draw(keys(part.shape))
    np.testing.assert_array_equal(device.to_host(part[again]), a[key][again])
    assert part.memory is x.memory and part.contiguous == (a[key].flags.c_contiguous or not part.size)


@given(shape=SHAPES, data=st.data())
def test_another_shape_holds_the_same_elements(device, shape, data):  # noqa: F811
    a, key = numbers(shape), data.draw(keys(shape))
    part, expected = device.from_host(a)[key], a[key]
    size = expected.size
    first = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])) if size else 0
    for wanted in [(size,), (1, size, 1)] + ([(first, -1), (first, size // first)] if size else []):
        np.testing.assert_array_equal(device.to_host(part.reshape(*wanted)), expected.reshape(wanted))
    if expected.flags.c_contiguous and size:
        assert part.reshape(size).memory is part.memory


def test_splitting_the_last_axis_makes_no_copy(device):  # noqa: F811
    """z | xBC | dt of a projection, and their heads."""
    x = device.from_host(numbers((2, 3, 12)))
    part = x[..., 4:10].reshape(2, 3, 2, 3)
    assert part.memory is x.memory and part.strides == (36, 12, 3, 1)
    assert part.reshape(6, 6).memory is x.memory and not part.contiguous


def test_an_axis_of_one_is_as_wide_as_what_it_holds(device):  # noqa: F811
    """The stride of an axis of size 1 is that of a contiguous array, so that kernels read whole vectors."""
    x = device.from_host(numbers((2, 3, 16)))
    assert x[:1, :1, 4:12].reshape(1, 8).strides == (8, 1)
    assert x[:, :1, 4:12].reshape(2, 1, 2, 4).strides == (48, 8, 4, 1)
    assert x[:1, :1, :1].reshape(1, 1).strides == (1, 1)


@given(shape=SHAPES, dtype=DTYPE, data=st.data())
def test_rows_are_taken_and_put_by_number(device, shape, dtype, data):  # noqa: F811
    a, count = numbers(shape, dtype), data.draw(st.integers(1, 4))
    rows = data.draw(st.lists(st.integers(-shape[0], shape[0] - 1), min_size=count, max_size=count))
    x = device.from_host(a)
    np.testing.assert_array_equal(device.to_host(x[rows]), a[rows])
    if len(shape) > 1:
        others = [row % shape[1] for row in rows]
        key = np.array(rows), np.array(others)
        np.testing.assert_array_equal(device.to_host(x[key]), a[key])
        np.testing.assert_array_equal(device.to_host(x[..., :1][rows]), a[..., :1][rows])
    rows, expected = sorted({row % shape[0] for row in rows}), a.copy()
    expected[rows] = a[rows][::-1]
    put = device.with_rows(x, rows, device.from_host(np.ascontiguousarray(a[rows][::-1])))
    np.testing.assert_array_equal(device.to_host(put), expected)
    np.testing.assert_array_equal(device.to_host(x), a)


@given(shape=SHAPES, dtype=st.sampled_from(("float32", "bfloat16")), seed=st.integers(0, 99))
def test_a_sum_is_rounded_once(device, shape, dtype, seed):  # noqa: F811
    a, b = np.random.default_rng(seed).standard_normal((2, *shape)).astype(DTYPES[dtype])
    x, y = device.from_host(a), device.from_host(b)
    expected = (a.astype(np.float32) + b.astype(np.float32)).astype(DTYPES[dtype])
    np.testing.assert_array_equal(device.to_host(x + y), expected)
    np.testing.assert_array_equal(device.to_host(x[::2] + y[::2]), expected[::2])


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 17)),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(("float32", "bfloat16")),
    wide=st.booleans(),
    apart=st.sampled_from((0, 3)),
)
def test_a_product_is_summed_in_float32(device, sizes, seed, dtype, wide, apart):  # noqa: F811
    """Rows may be strided; the result has the dtype of x, or that of `out`."""
    (m, i, o), rng = sizes, np.random.default_rng(seed)
    x, w = (rng.standard_normal((rows, i + apart)).astype(DTYPES[dtype]) for rows in (m, o))
    out = device.empty((m, o), "float32") if wide else None
    y = device.matmul(device.from_host(x)[:, :i], device.from_host(w)[:, :i], out)
    x, w = x[:, :i].astype(np.float64), w[:, :i].astype(np.float64)
    eps = 2.0**-8 if dtype == "bfloat16" and not wide else 2.0**-22
    assert y.dtype == ("float32" if wide else dtype) and (out is None or y is out)
    error = np.abs(device.to_host(y).astype(np.float64) - x @ w.T)
    assert (error <= eps * (np.abs(x) @ np.abs(w).T)).all()


def test_host_and_device_memory_do_not_mix(device):  # noqa: F811
    x, a = device.from_host(numbers((2, 3))), numbers((2, 3))
    for wrong in (
        lambda: x + a,
        lambda: a + x,
        lambda: np.add(a, x),
        lambda: np.asarray(x),
        lambda: x + 1,
        lambda: x[5],
        lambda: x["a"],
        lambda: device.from_host(a.astype(np.float64)),
    ):
        with pytest.raises((TypeError, IndexError)):
            wrong()
    for wrong in (
        lambda: x + x[:1],
        lambda: x.reshape(4, 2),
        lambda: x.reshape(-1, -1),
        lambda: device.copy(x, x[:, :2]),
        lambda: device.upload(x, a[:1]),
        lambda: device.upload(x[:, :2], a[:, :2]),
    ):
        with pytest.raises(ValueError, match=r"fit|added|copied|go to"):
            wrong()
    with pytest.raises(IndexError):
        x[[2]]


def test_a_graph_does_again_what_was_captured(device):  # noqa: F811
    """Every replay reads the current values; the capture itself runs nothing."""
    x, y = device.zeros((4,), "float32"), device.zeros((4,), "float32")
    device.matmul(x.reshape(1, 4), x.reshape(1, 4))  # the library is ready before a capture
    products = device.empty((1, 1), "float32")
    for ready in range(2):
        if ready:
            graph = device.capture(work)
        else:

            def work():
                device.copy(x + x, y)
                device.matmul(y.reshape(1, 4), y.reshape(1, 4), products)

            work()
            device.upload(y, np.zeros(4, np.float32))
    assert not device.to_host(y).any()
    for value in (1, 2):
        device.upload(x, np.full(4, value, np.float32))
        graph.replay()
        assert device.to_host(y).tolist() == [2 * value] * 4
        assert device.to_host(products).item() == 16 * value**2


def test_nothing_goes_from_or_to_the_host_while_a_graph_is_captured(device):  # noqa: F811
    x = device.from_host(numbers((4,)))
    for wrong in (lambda: device.to_host(x), lambda: device.upload(x, numbers((4,)))):
        with pytest.raises((EmulationError, RuntimeError), match="captured"):
            device.capture(wrong)
    assert device.to_host(x).tolist() == [1, 2, 3, 4]


FILES = sorted(KERNELS.glob("*.cu"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_parameters_of_every_kernel_are_understood(path):
    """Every __global__ function can be launched."""
    found = signatures(path)
    assert len(found) == path.read_text().count("__global__") > 0
    for parameters in found.values():
        for parameter in parameters:
            known = allowed(parameter.type, ("BYTES_4",)) if parameter.pointer else SCALARS[parameter.type]
            assert known and parameter.name.isidentifier()


@needs_compiler
def test_numbers_go_over_and_come_back_as_they_were():
    device = EmulatedDevice()  # noqa: F811
    for dtype in DTYPES.values():
        a = numbers((3, 5)).astype(dtype)
        back = device.to_host(device.from_host(a[:, ::2]))
        assert back.dtype == dtype and np.array_equal(back, a[:, ::2])
    assert device.from_host(np.zeros(3, ml_dtypes.bfloat16)).dtype == "bfloat16"
    assert device.to_host(device.empty((0, 3), "int64")).shape == (0, 3)

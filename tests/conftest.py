"""Shared by all tests: the tiers, the number of examples of Hypothesis, and the backends under test.

    pytest -m "not slow"    quick: aims at 3 minutes on two quiet cores
    pytest                  default: aims at 10 minutes
    pytest --thorough       all: also the tests marked `thorough`, as .ci/run does
    pytest --hunt 10        ten times the examples, new ones in each run; all other runs draw the same ones

`tests/support/tries.py` chooses the number of examples by the tier.
A line in `tests/support/benches.py` runs the laws and the recorded vectors on another backend.
"""

import os
import signal
import sys

import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

from tests.support.shapes import jaxtyped_once

jaxtyping.jaxtyped = jaxtyped_once  # the decorator that --jaxtyping-packages gives to all of refengine.spec
EXAMPLES = 12  # of a law with --thorough, unless its test has its own number; the default tier draws half
COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
SAME = dict(derandomize=True, database=None)
settings.register_profile("default", max_examples=EXAMPLES // 2, **SAME, **COMMON)
settings.register_profile("thorough", max_examples=EXAMPLES, **SAME, **COMMON)
settings.load_profile("default")
SLOW = ("tests/backends/cuda", "tests/backends/torch")  # laws on an emulator, and on PyTorch

sys.dont_write_bytecode = False  # hundreds of processes start; each would compile all modules again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell ignores SIGINT in background jobs, and child processes inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run the tests marked thorough too")
    parser.addoption("--hunt", type=int, metavar="N", help="N times the examples, new ones in each run")


def pytest_configure(config):
    """Choose the profile before the tests are imported, because they read the number of examples from it."""
    if times := config.getoption("--hunt"):
        settings.register_profile("hunt", max_examples=times * EXAMPLES, print_blob=True, **COMMON)
        settings.load_profile("hunt")
    elif config.getoption("--thorough"):
        settings.load_profile("thorough")


def pytest_collection_modifyitems(config, items):
    """Mark slow laws and thorough tests as slow; leave out thorough ones unless they are asked for."""
    for item in items:
        if item.nodeid.startswith(SLOW) and hasattr(item.function, "hypothesis"):
            item.add_marker(pytest.mark.slow)
    asked = config.getoption("--thorough") or "thorough" in (config.getoption("-m") or "")
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    for item in left_out:
        item.add_marker(pytest.mark.slow)
    if left_out and not asked:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


@pytest.fixture(scope="session", autouse=True)
def one_thread_each():
    """Limit the libraries to one thread: spinning threads of several test processes block each other."""
    from threadpoolctl import threadpool_limits

    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # for the processes that tests start
        os.environ.setdefault(name, "1")
    with threadpool_limits(1):
        yield


# Nothing here may import `spec` when pytest starts: its shapes are checked only if it is imported after that.
def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        from tests.support.benches import BENCHES, marks

        law = hasattr(metafunc.function, "hypothesis")
        names = [pytest.param(name, marks=marks(name) if law else ()) for name in BENCHES]
        metafunc.parametrize("backend", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request):
    """Return a backend in one precision: all of refengine.spec.ops.Backend, and `dtype`."""
    from tests.support.benches import BENCHES

    return BENCHES[request.param]()


def pytest_terminal_summary(terminalreporter):
    """Print measurements: the worst of each `record_property("worst ...", ...)`, the sum of all others."""
    measured = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            measured.setdefault(name, []).append(value)
    for name, values in measured.items():
        result = f"{max(values):.2g}" if name.startswith("worst") else f"{sum(values)}"
        terminalreporter.write_line(f"measured: {name}: {result} (of {len(values)})")

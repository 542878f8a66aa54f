"""Plant a fault, and check that a test fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

import refengine.spec.mixers
from refengine.conformance.cases import Case
from refengine.conformance.mistakes import Mistake, named
from tests.support.benches import BENCHES
from tests.support.vectors import Vector, replay


@dataclass(frozen=True)
class Fault:
    """`check(backend)` must see the difference that `plant` makes.

    plant: a known mistake, verbs of a backend, or (monkeypatch) -> None.
    """

    what: str
    plant: Mistake | dict[str, Callable] | Callable
    check: Callable
    raises: type = AssertionError

    def goes_red(self, monkeypatch) -> None:
        """Check that the test passes without the fault and fails with it."""
        healthy = BENCHES["numpy-float32"]()
        self.check(healthy)
        sick = healthy
        if isinstance(self.plant, Mistake) and self.plant.step == "mixer":
            monkeypatch.setitem(refengine.spec.mixers.MIXERS, self.plant.kind, self.plant.wrong)
        elif isinstance(self.plant, Mistake):
            sick = replace(healthy, ops=replace(healthy.ops, **self.plant.verbs(healthy.ops, Case().cfg)))
        elif isinstance(self.plant, dict):
            sick = replace(healthy, ops=replace(healthy.ops, **self.plant))
        else:
            self.plant(monkeypatch)
        with pytest.raises(self.raises):
            self.check(sick)


def known(name: str, check: Callable) -> Fault:
    """Return a mistake of the table, under its name and the number of its trap."""
    mistake = named(name)
    return Fault(f"trap {mistake.trap}: {name}" if mistake.trap else name, mistake, check)


def each(faults: list[Fault]):
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.what)


def vector(name: str):
    """Return the check of a recorded vector."""
    return lambda backend: replay(Vector(name), backend)


def law(test, **drawn):
    """Return the check of a law of another file, on one case."""
    return lambda backend: test.hypothesis.inner_test(backend, **drawn)


def plain(test, *args):
    """Return the check of a test that needs no backend."""
    return lambda backend: test(*args)


def setting(target, name: str, value):
    return lambda patch: patch.setattr(target, name, value)

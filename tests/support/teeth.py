"""How a fault is planted, and how a test is seen to go red."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from tests.support.benches import BENCHES
from tests.support.vectors import Vector, replay


@dataclass(frozen=True)
class Fault:
    """`plant`: verbs of a backend, or (monkeypatch) -> None; `check(backend)` must see the difference."""

    what: str
    plant: dict[str, Callable] | Callable
    check: Callable
    raises: type = AssertionError

    def goes_red(self, monkeypatch) -> None:
        """Green on the healthy backend, red on the sick one."""
        healthy = BENCHES["numpy-float32"]()
        self.check(healthy)
        sick = healthy
        if isinstance(self.plant, dict):
            sick = replace(healthy, ops=replace(healthy.ops, **self.plant))
        else:
            self.plant(monkeypatch)
        with pytest.raises(self.raises):
            self.check(sick)


def each(faults: list[Fault]):
    return pytest.mark.parametrize("fault", faults, ids=lambda fault: fault.what)


def vector(name: str):
    """A recorded answer."""
    return lambda backend: replay(Vector(name), backend)


def law(test, **drawn):
    """A law of another file, on one case."""
    return lambda backend: test.hypothesis.inner_test(backend, **drawn)


def plain(test, *args):
    """A test that needs no backend."""
    return lambda backend: test(*args)


def setting(target, name: str, value):
    return lambda patch: patch.setattr(target, name, value)

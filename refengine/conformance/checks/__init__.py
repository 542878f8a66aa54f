"""Checks: sentences that hold for every right backend, as functions, and strategies that draw their cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CHECKS: list[Check] = []


@dataclass(frozen=True)
class Check:
    """A function of a candidate and of drawn values; it raises AssertionError where its sentence is false.

    operation  the row of the report that it belongs to
    draws      returns the strategies by argument; imported only when they are asked for, as Hypothesis is
    examples   arguments that are always tried
    uses       verbs, or letters of layers, without which it says nothing; none for checks of text
    share      of the examples that other checks get
    needs      (candidate) -> whether it has what is checked
    """

    run: Callable[..., None]
    operation: str
    draws: Callable[[], dict[str, Any]]
    examples: tuple[dict[str, Any], ...] = ()
    uses: tuple[str, ...] = ()
    share: float = 1.0
    needs: Callable[[Any], bool] = field(default=lambda candidate: True)

    @property
    def name(self) -> str:
        """Return the name of the function."""
        return self.run.__name__

    @property
    def sentence(self) -> str:
        """Return the name as a sentence."""
        return self.name.replace("_", " ")

    def __call__(self, backend, **drawn) -> None:
        """Run the check on one case; AssertionError where it does not hold."""
        self.run(backend, **drawn)


def check(
    operation: str, draws: Callable[[], dict[str, Any]], **how
) -> Callable[[Callable[..., None]], Check]:
    """Return a decorator that makes a function a check of this operation, and adds it to CHECKS."""

    def made(run: Callable[..., None]) -> Check:
        built = Check(run, operation, draws, **how)
        CHECKS.append(built)
        return built

    return made


def drawing(layers: str = "M", cuts: bool = False, **how) -> Callable[[], dict]:
    """Return a function that returns strategies: a case of these layers and, with `cuts`, where to cut it."""

    def draws() -> dict:
        from refengine.conformance.strategies import CUTS, cases

        return {"case": cases(layers, **how)} | ({"cuts": CUTS} if cuts else {})

    return draws


def one_of(draws: Callable[[], dict], **values) -> Callable[[], dict]:
    """Return a function that returns these strategies, and for each name one that draws one of its values."""

    def more() -> dict:
        from hypothesis import strategies as st

        return draws() | {name: st.sampled_from(among) for name, among in values.items()}

    return more


def expect(holds, what: str) -> None:
    """Raise AssertionError with this text unless something holds."""
    if not holds:
        raise AssertionError(what)

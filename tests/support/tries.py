"""Set, by the tier of the run, the number of examples that Hypothesis draws, and the cases of a test."""

from __future__ import annotations

import pytest
from hypothesis import settings

__all__ = ["thorough", "tries"]


def thorough(*cases) -> list:
    """Return cases of a parametrized test, each a value or a tuple of values, that only --thorough runs."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.thorough)
        for case in cases
    ]


def tries(examples: int, default: int | None = None, **how) -> settings:
    """Return settings of a test that draws `examples` with --thorough, and N times as many with --hunt N.

    The default tier draws `default` examples, or all of them without it; `how`: other settings of Hypothesis.
    """
    profile = settings.get_current_profile_name()
    if profile == "default" and default is not None:
        examples = default
    elif profile == "hunt":
        examples *= settings().max_examples // settings.get_profile("thorough").max_examples
    return settings(max_examples=examples, **how)

"""Set the number of examples that Hypothesis draws, by the tier of the run."""

from __future__ import annotations

from hypothesis import settings

__all__ = ["tries"]


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

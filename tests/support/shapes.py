"""Check the signatures of `refengine.spec` once for each combination of types, shapes and dtypes.

jaxtyping checks the arguments twice in each call, and compiles the checks of an inner function again in each
call of the outer one. Most calls repeat an earlier one in all that a check reads.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types

import numpy as np
from jaxtyping import jaxtyped

__all__ = ["jaxtyped_once"]

PLAIN = {bool, int, float, str, bytes, type(None)}
LONG = 8  # items of a list or tuple: of a longer one, beartype checks any one


def form(value):
    """Return what a check of `value` reads: its type, the shape and dtype of an array, the forms of items."""
    kind = type(value)
    if kind in PLAIN:
        return kind
    if isinstance(value, np.ndarray):
        return kind, value.shape, value.dtype
    if kind in (tuple, list):
        return kind, len(value) <= LONG, *map(form, value if len(value) <= LONG else value[-1:])
    if kind is dict:  # of which beartype checks the first item
        return kind, *map(form, next(iter(value.items()), ()))
    return value if isinstance(value, type) else kind


class Checks:
    """The checks of one definition, and the forms of calls that have passed them."""

    def __init__(self, function, typechecker):
        self.passed, self.function, self.typechecker = set(), function, typechecker

    @functools.cached_property
    def check(self):
        """Return a function that checks arguments, calls `call_` with them, and checks the result."""

        def call(*args, call_, **named):
            return call_(*args, **named)

        of = inspect.signature(self.function)
        parameters = sorted(
            [*of.parameters.values(), inspect.Parameter("call_", inspect.Parameter.KEYWORD_ONLY)],
            key=lambda parameter: parameter.kind,
        )
        # Annotations are looked up among the globals of the function that is checked.
        call = types.FunctionType(call.__code__, self.function.__globals__)
        functools.update_wrapper(call, self.function)
        call.__signature__ = of.replace(parameters=parameters)
        return jaxtyped(call, typechecker=self.typechecker)


ALL = {}  # checks by name and code: an inner function is defined in each call of the outer one


def jaxtyped_once(thing=None, *, typechecker):
    """Return a function or dataclass as `jaxtyping.jaxtyped` does, with one check for each form of calls."""
    if thing is None:
        return functools.partial(jaxtyped_once, typechecker=typechecker)
    if dataclasses.is_dataclass(thing):
        thing.__init__ = jaxtyped_once(thing.__init__, typechecker=typechecker)
    if not inspect.isfunction(thing):
        return thing if inspect.isclass(thing) else jaxtyped(thing, typechecker=typechecker)
    key = thing.__module__, thing.__qualname__, thing.__code__
    checks = ALL.setdefault(key, Checks(thing, typechecker))
    passed = checks.passed

    @functools.wraps(thing)
    def once(*args, **named):
        __tracebackhide__ = True
        given = tuple(map(form, args)), tuple([(name, form(value)) for name, value in named.items()])
        if given not in passed:
            result = checks.check(*args, call_=thing, **named)
            passed.add(given)
            passed.add((given, form(result)))
            return result
        result = thing(*args, **named)
        if (given, form(result)) not in passed:
            checks.check(*args, call_=lambda *_, **__: result, **named)
            passed.add((given, form(result)))
        return result

    return once

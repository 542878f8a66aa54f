"""Tests made of the checks of refengine.conformance."""

from hypothesis import example, given

from refengine.conformance.checks import Check


def test_of(check: Check):
    """Return a test of a check: a function of the fixture `backend`, for each backend under test."""

    draws = check.draws()
    if not draws:
        return lambda backend: check(backend)
    test = given(**draws)(check.run)
    for arguments in check.examples:
        test = example(**arguments)(test)
    return test


test_of.__test__ = False

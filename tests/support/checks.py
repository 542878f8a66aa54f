"""Make tests from the checks of refengine.conformance."""

from hypothesis import example, given

from refengine.conformance.checks import Check

TESTED: set[str] = set()  # names of the checks that some test runs


def test_of(check: Check, bench=None):
    """Return a test of a check, with `bench`, or with the fixture `backend` for each backend under test."""

    TESTED.add(check.name)
    draws = check.draws()
    if not draws:
        return lambda backend: check(backend)
    test = given(**draws)(check.run if bench is None else lambda **drawn: check(bench, **drawn))
    for arguments in check.examples:
        test = example(**arguments)(test)
    return test


test_of.__test__ = False

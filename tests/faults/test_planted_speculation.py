"""Each known mistake of speculation, planted, fails its check; without it the check passes."""

import pytest

from refengine.conformance.cases import Case
from refengine.conformance.checks import speculation
from refengine.conformance.mistakes.speculation import DRAFTS, FAULTS, RULE, STEPS
from tests.support.benches import BENCHES

CASES = {
    DRAFTS: {"case": Case(layers="M*", mtp_layers="*E", length=9, batch=1), "rows": [2, 3, 1]},
    STEPS: {"case": Case(layers="M*", mtp_layers="*E", length=5), "drafts": [3, 2, 4]},
    RULE: {"seed": 5, "size": 4, "temperature": 3.0, "top_k": 0},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_a_mistake_of_speculation_goes_red(fault, monkeypatch):
    check, drawn = getattr(speculation, fault.check), CASES[fault.check]
    bench = BENCHES["numpy-float64"]()
    check(bench, **drawn)
    monkeypatch.setattr(fault.owner, fault.name, fault.wrong)
    with pytest.raises(AssertionError):
        check(bench, **drawn)


def test_titles_are_unique():
    assert len({fault.title for fault in FAULTS}) == len(FAULTS) >= 9

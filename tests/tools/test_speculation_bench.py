"""The cost model of speculation has consistent parts, and figures near the published ones."""

import pytest

from tools.bench.speculation import DRAFTS, PUBLISHED, RECIPES, predicted, rate_of, tokens_of


@pytest.mark.parametrize("tokens, drafts", [(1.0, 3), (4.387, 7), (3.45, 7), (2.9, 2)])
def test_the_rate_of_acceptance_is_that_of_the_tokens_a_call(tokens, drafts):
    assert tokens_of(rate_of(tokens, drafts), drafts) == pytest.approx(tokens)


def test_what_costs_nothing_gives_all_tokens_and_what_is_never_right_gives_none():
    fast, slow = 1.0, 0.0
    for rate, holds in ((fast, lambda up: up > 1), (slow, lambda up: up < 1)):
        ups = [predicted("lightning", RECIPES["NVFP4"], "B200", k, rate, 20e-6, 10_000)[1] for k in DRAFTS]
        assert all(map(holds, ups))


@pytest.mark.slow
def test_ultra_gains_most_with_about_the_published_number_of_drafts():
    """The report has 2.89x with 6 drafts, more than bytes and 20 us a layer allow."""
    rate = rate_of(*PUBLISHED["ultra"])
    ups = {k: predicted("ultra", RECIPES["NVFP4"], "B200", k, rate, 20e-6, 10_000) for k in DRAFTS}
    assert ups[1][2] == 4 and max(ups, key=lambda k: ups[k][1]) in (5, 6, 7)
    assert 1.9 < ups[6][1] < 2.89

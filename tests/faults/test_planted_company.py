"""Each planted fault in shared slots, forks, calls of `score` and ties fails a law."""

from dataclasses import replace

import numpy as np
import pytest

from refengine import runner
from refengine.conformance.cases import Case
from refengine.runner import LocalRunner, Slots
from refengine.spec import mtp, state
from refengine.spec.moe import Routing
from tests.book import test_forks, test_ties
from tests.engine import test_company, test_loop_fair, test_slots
from tests.support.benches import BENCHES

SCORE = dict(case=Case(length=12, batch=1, mtp_layers="*E", num_experts_per_tok=9, chunk_size=1), chunk=5)
FORKS = dict(case=Case(layers="*"), turns=test_forks.SECOND_ROW_ONLY)


def bench():
    return BENCHES["numpy-float64"]()


def slots(moves):
    return lambda: test_slots.test_whoever_is_asked_for_gets_its_own_states.hypothesis.inner_test(moves=moves)


def forks():
    law = test_forks.test_forks_that_go_on_by_turns_do_not_see_each_other
    for start in [2, 2, 2], [0, 3, 1]:
        law.hypothesis.inner_test(bench(), start=start, **FORKS)


def score():
    law = test_company.test_every_value_of_score_is_that_of_one_position_at_a_time
    law.hypothesis.inner_test(**SCORE)


def alone():
    law = test_loop_fair.test_an_error_of_one_sequence_ends_that_one_alone
    law.hypothesis.inner_test(breaks={1: 0, 3: 2}, slots=6)


def guard_of_the_first_row(patch):
    """Treat the other rows as unwritten, whatever a fork has appended to them."""
    right = state.Cache.append

    def append(self, k, v, lengths=None):
        if self.written[0] == self.length[0]:
            self.written[:] = self.length
        return right(self, k, v, lengths)

    patch.setattr(state.Cache, "append", append)


def a_copy_as_long_as_the_first_row(patch):
    def copied(self, room, exactly=False):
        known, shape = int(self.length[0]), (self.k.shape[0], max(64, room), *self.k.shape[2:])
        k, v = np.zeros(shape, self.k.dtype), np.zeros(shape, self.v.dtype)
        k[:, :known], v[:, :known] = self.k[:, :known], self.v[:, :known]
        return state.Cache(k, v, self.length, self.length.copy())

    patch.setattr(state.Cache, "_copied", copied)


def slots_in_any_order(patch):
    right = Slots.gather

    def gather(self, slots):
        stored = next((rows for rows, _ in self.batches if set(rows) == set(slots)), slots)
        return right(self, stored)

    patch.setattr(Slots, "gather", gather)


def joined_with_the_others_slots(patch):
    right = state.join

    def join(parts, chosen):
        several = len({part for part, _ in chosen}) > 1
        return right(parts, chosen[:-2] + chosen[:-3:-1] if several else chosen)

    patch.setattr(state, "join", join)


def the_head_forgets_at_each_call(patch):
    right = mtp.predict

    def predict(model, h, following, states, *rest, **named):
        return right(model, h, following, mtp.new_states(model, len(h)) if h.shape[1] > 1 else states)

    patch.setattr(mtp, "predict", predict)


def an_error_of_one_is_raised_for_all(patch):
    right = LocalRunner.call

    def call(self, *args):
        for draw in (draws := right(self, *args)):
            if isinstance(draw, Exception):
                raise draw
        return draws

    patch.setattr(LocalRunner, "call", call)


FAULTS = [
    (guard_of_the_first_row, forks),
    (a_copy_as_long_as_the_first_row, forks),
    (slots_in_any_order, slots([("read", test_slots.ORDER, 4), ("step", [3, 2, 1, 0, 4, 5, 6], 4)])),
    (joined_with_the_others_slots, slots(test_slots.JOINED)),
    (the_head_forgets_at_each_call, score),
    (an_error_of_one_is_raised_for_all, alone),
]


@pytest.mark.parametrize("plant, law", FAULTS, ids=lambda each: each.__name__)
def test_a_planted_fault_goes_red(plant, law, monkeypatch):
    law()
    plant(monkeypatch)
    with pytest.raises((AssertionError, runner.InputError)):
        law()


def highest_of_equals(backend):
    """Return a backend whose router prefers the later of equal experts in a call of one position."""

    def route(h, gate, bias, cfg):
        if h.shape[1] > 1:
            return backend.ops.route(h, gate, bias, cfg)
        turned = replace(cfg, n_group=1, topk_group=1)
        found = backend.ops.route(h, gate[::-1], bias[::-1], turned)
        return Routing(cfg.n_routed_experts - 1 - found.expert, found.weight)

    return replace(backend, ops=replace(backend.ops, route=route))


def test_a_tie_to_the_higher_index_in_a_call_of_one_position_goes_red():
    law = test_ties.test_of_equal_experts_the_lowest_is_chosen_by_any_call.hypothesis.inner_test
    drawn = dict(bias=[0] * 12, k=4, limited=(1, 1))
    law(bench(), shape=(1, 1), **drawn)
    law(highest_of_equals(bench()), shape=(1, 3), **drawn)
    with pytest.raises(AssertionError):
        law(highest_of_equals(bench()), shape=(1, 1), **drawn)

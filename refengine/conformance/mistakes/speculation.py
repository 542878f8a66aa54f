"""Known mistakes of speculation: of drafts, of what is kept of a call, and of acceptance.

They are no steps of a layer, so a trace does not show them; the check that each is named with goes red. Those
of the head itself, such as swapped halves, a hidden state before the final norm or a LayerNorm at its end,
are in the table of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refengine import runner as runners
from refengine.spec import model as assembly
from refengine.spec import mtp, sample
from refengine.speculation import acceptance

LocalRunner = runners.LocalRunner


@dataclass(frozen=True)
class Fault:
    """A mistake: `wrong` takes the place of `name` in `owner`, and the check of this name goes red."""

    title: str
    check: str
    owner: object
    name: str
    wrong: Callable


def keeps_provisional_rows(model, h, next_ids, states, count, choose, lengths=None):
    """Draft, and return states that have the rows of the head's own output."""
    o, states = mtp.predict(model, h, model.backend.array(next_ids), states)
    o = o[:, -1:]
    for _ in range(count):
        guess = np.asarray(choose(model.backend.fetch(model.head(o))[:, 0]), np.int64)
        o, states = mtp.predict(model, o, model.backend.array(guess[:, None]), states)
    return states


def goes_on_from_the_trunk(model, h, next_ids, states, count, choose, lengths=None):
    """Draft each time from the trunk's hidden state, not from the head's output."""
    here = model.backend
    o, states = mtp.predict(model, h, here.array(next_ids), states)
    o, provisional = o[:, -1:], [state and state.tentative() for state in states]
    for _ in range(count):
        guess = np.asarray(choose(here.fetch(model.head(o))[:, 0]), np.int64)
        o, provisional = mtp.predict(model, h[:, -1:], here.array(guess[:, None]), provisional)
    return states


def forgets_its_cache(model, h, next_ids, states, count, choose, lengths=None):
    """Draft with an empty cache in each call."""
    return RIGHT_DRAFT(model, h, next_ids, mtp.new_states(model, len(next_ids)), count, choose, lengths)


def all_is_kept(self, slots, records, counts, *layers):
    """Replay every token that was fed."""
    return RIGHT_REPLAY(self, slots, records, self.recorded[1], *layers)


def one_too_few(self, slots, records, counts, *layers):
    """Replay the drafts that were kept without the token before them."""
    return RIGHT_REPLAY(self, slots, records, [max(0, count - 1) for count in counts], *layers)


def S_is_not_rolled_back(kind, record, w, cfg, state, most, lengths, ops):
    """Return a state whose S has read all positions of a recorded call, and whose tail only those kept."""
    kept = RIGHT_KEEPING(kind, record, w, cfg, state, most, lengths, ops)
    if kind != "M" or record is None:
        return kept
    whole = RIGHT_KEEPING(kind, record, w, cfg, state, record[0].shape[1], None, ops)
    return replace(kept, S=whole.S)


def by_q_over_p(ids, p, draft, generator):
    """Accept with probability min(1, q / p)."""
    p_of = acceptance.of(ids, p, draft.token)
    q_of = acceptance.of(draft.ids, draft.q, draft.token)
    if generator.random() * p_of < q_of:
        return draft.token, 1
    rest = np.maximum(p - acceptance.spread(draft.ids, draft.q, ids), 0)
    return int(ids[sample.draw(rest if rest.sum() > 0 else p, generator)]), 2


def always(ids, p, draft, generator):
    """Accept every draft that the filters leave."""
    generator.random()
    return draft.token, 1


def from_p(ids, p, draft, generator):
    """Draw from p in place of a draft that is not accepted, not from what is left of it."""
    p_of = acceptance.of(ids, p, draft.token)
    if generator.random() * acceptance.of(draft.ids, draft.q, draft.token) < p_of:
        return draft.token, 1
    return int(ids[sample.draw(p, generator)]), 2


RIGHT_DRAFT, RIGHT_REPLAY, RIGHT_KEEPING = mtp.draft, LocalRunner.replay, assembly.replay
DRAFTS = "drafts_begin_from_rows_of_the_trunk_and_go_on_from_the_heads_own"
STEPS = "a_call_with_drafts_is_so_many_steps"
RULE = "a_draft_is_kept_or_replaced_so_that_the_distribution_stays"
FAULTS = (
    Fault("rows of the head's cache stay provisional", DRAFTS, mtp, "draft", keeps_provisional_rows),
    Fault("deeper drafts read the trunk's hidden state", DRAFTS, mtp, "draft", goes_on_from_the_trunk),
    Fault("the head forgets its cache between calls", DRAFTS, mtp, "draft", forgets_its_cache),
    Fault("the state is not rolled back", STEPS, LocalRunner, "replay", all_is_kept),
    Fault("the state lacks the token before the drafts", STEPS, LocalRunner, "replay", one_too_few),
    Fault("S is not rolled back, the tail is", STEPS, assembly, "replay", S_is_not_rolled_back),
    Fault("a draft is accepted by q / p", RULE, acceptance, "verified", by_q_over_p),
    Fault("every draft is accepted", RULE, acceptance, "verified", always),
    Fault("a token in place of a draft is drawn from p", RULE, acceptance, "verified", from_p),
)

"""The states of slots stay with their slots, whatever slots are stored, taken and dropped together."""

from dataclasses import dataclass

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.runner import Slots
from tests.support.tries import tries


@dataclass(frozen=True)
class Named:
    """A stand-in for the state of a layer: a name for each row, and the number of its steps."""

    rows: tuple

    def take(self, rows):
        """Return the states of these rows."""
        return Named(tuple(np.array([*self.rows, None], object)[: len(self.rows)][rows]))

    def put(self, rows, other):
        """Return a state in which these rows are those of `other`."""
        new = list(self.rows)
        for row, value in zip(rows, other.rows, strict=True):
            new[row] = value
        return Named(tuple(new))


MOVES = st.lists(
    st.tuples(
        st.sampled_from(("read", "step", "step", "drop")), st.permutations(range(7)), st.integers(1, 7)
    ),
    min_size=1,
    max_size=12,
)
ORDER = list(range(7))
JOINED = [("read", ORDER, 3), ("read", ORDER[3:] + ORDER[:3], 2), ("step", [4, 0, 3, 1, 2, 5, 6], 5)]
LEFT = [
    ("read", ORDER, 6),
    ("drop", [1, 4, 0, 2, 3, 5, 6], 2),
    ("read", [4, 1, 0, 2, 3, 5, 6], 2),
    ("step", ORDER, 6),
]


@tries(300, 100)
@given(moves=MOVES)
@example(moves=JOINED)
@example(moves=LEFT)
@example(moves=[("read", ORDER, 4), ("step", ORDER[3::-1] + ORDER[4:], 4)])
def test_whoever_is_asked_for_gets_its_own_states(moves):
    """A layer with a state and one without; a dropped slot starts anew; a batch ends with its last slot."""
    slots, known, fresh = Slots(), {}, 0
    for move, order, count in moves:
        if move == "read":  # new sequences, one call
            chosen = [slot for slot in order[:count] if slot not in known]
            if not chosen:
                continue
            for slot in chosen:
                known[slot], fresh = (fresh, 0), fresh + 1
            slots.keep(chosen, [Named(tuple(known[slot] for slot in chosen)), None])
        elif move == "step":
            chosen = [slot for slot in order[:count] if slot in known]
            if not chosen:
                continue
            states, nothing = slots.gather(chosen)
            assert nothing is None and states.rows == tuple(known[slot] for slot in chosen)
            known |= {slot: (known[slot][0], known[slot][1] + 1) for slot in chosen}
            slots.keep(chosen, [Named(tuple(known[slot] for slot in chosen)), None])
        else:
            slots.drop(order[:count])
            known = {slot: name for slot, name in known.items() if slot not in order[:count]}
        assert slots.held == sorted(known) and all(len(r) == len(s[0].rows) for r, s in slots.batches)
        assert all(set(rows) != {None} for rows, _ in slots.batches)
    for slot in [slot for slot in ORDER if slot in known]:
        assert slots.gather([slot])[0].rows == (known[slot],)
    assert not slots.batches

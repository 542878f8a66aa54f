"""In the loop no sequence harms another: neither by an error nor by starvation."""

from collections import deque
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import refengine
from refengine import End, InputError
from refengine.conformance.cases import Case
from refengine.conformance.truth import model
from refengine.generation import Options
from refengine.loop import PATIENCE, Loop
from refengine.progress import Bar, progress
from refengine.runner import LocalRunner
from refengine.spec.ops import numpy_backend

CASE = Case(layers="M*", batch=1)


class Letters:
    """A tokenizer for models without one."""

    stop_ids = frozenset()

    def stream(self, skip_special_tokens: bool):
        return self

    def push(self, token: int) -> str:
        return chr(65 + token)


class Breaking(LocalRunner):
    """A runner whose logits become unusable for some sequences, each after some tokens."""

    def __init__(self, made, breaks: dict[int, int]):
        super().__init__(made)
        self.breaks = breaks  # by the first token of a prompt: how many tokens are drawn before the error

    def drawn(self, slot, logits):
        ids = self.drawings[slot].ids
        if len(ids) - LENGTH >= self.breaks.get(ids[0], 99):
            return InputError(f"sequence {ids[0]} is damaged")
        return super().drawn(slot, logits)


LENGTH = 3  # tokens of each prompt


def played(count: int, breaks: dict[int, int], slots: int) -> list[list]:
    """Return the events of this many sequences; the prompt of number i begins with i."""
    loop = Loop(Breaking(model(CASE, numpy_backend("float64")), breaks), Letters, size=slots)
    inboxes = [deque() for _ in range(count)]
    for i, inbox in enumerate(inboxes):
        options = Options(max_tokens=5, temperature=1.0, seed=i)
        loop.add(i, [i, *range(20, 19 + LENGTH)], options, inbox)
    while loop.queue or loop.active:
        loop.turn()
    assert not loop.runner.drawings and not loop.runner.slots.batches
    return [[event for _, event in inbox] for inbox in inboxes]


@given(breaks=st.dictionaries(st.integers(0, 5), st.integers(0, 4)), slots=st.integers(1, 6))
@example(breaks={1: 0, 3: 2}, slots=6)
def test_an_error_of_one_sequence_ends_that_one_alone(breaks, slots):
    sound, found = played(6, {}, 6), played(6, breaks, slots)
    for i, events in enumerate(found):
        kept = breaks.get(i, len(sound[i]))
        assert [getattr(e, "id", None) for e in events[:kept]] == [
            getattr(e, "id", None) for e in sound[i][:kept]
        ]
        if i in breaks:
            [error] = events[kept:]
            assert isinstance(error, InputError) and f"sequence {i} " in str(error)
        else:
            assert isinstance(events[-1], End) and events[-1].reason == "length"


@given(chunks=st.integers(1, 4), length=st.integers(1, 5))
def test_a_long_prompt_is_read_however_many_short_ones_come(chunks, length):
    """With a new short prompt each turn, each part of the long prompt is delayed PATIENCE times at most."""
    loop = Loop(LocalRunner(model(CASE, numpy_backend("float64"))), Letters, size=3)
    options, inbox = Options(max_tokens=1, temperature=0, seed=0), deque()
    with mock.patch("refengine.runner.PREFILL", 11):
        loop.add(0, [5] * 11 * chunks, options, inbox)
        for turn in range((PATIENCE + 1) * chunks):
            loop.add(1 + turn, [6] * length, options, deque())
            loop.turn()
        assert inbox, "it has not been read"
        while loop.queue or loop.active:
            loop.turn()


@pytest.mark.parametrize("share, first", [(0.9, 1), (0.4, 1), (0.2, 2), (0.1, 5)])
def test_all_sequences_in_slots_have_room_to_grow_to_their_ends(share, first, monkeypatch):
    """Each may take this share of the memory; those in slots take it only as they are read and drawn."""
    runner = LocalRunner(model(CASE, numpy_backend("float64")))
    loop = Loop(runner, Letters, size=8)
    need, sizes = runner.sizes.of(3 + 5), runner.sizes

    def available() -> int:
        return int(need / share) - sum(sizes.of(s.lengths[0]) for s in loop.active.values() if s.read)

    monkeypatch.setattr("refengine.runner.available_memory", available)
    for i in range(8):
        loop.add(i, [5] * 3, Options(max_tokens=5, temperature=0, seed=i), deque())
    loop.admit()
    assert len(loop.active) == first
    while loop.queue or loop.active:
        loop.turn()
        assert len(loop.active) * need <= need / share


@pytest.mark.parametrize("how", ["cancelled", "interrupted", "closed"])
def test_the_bar_of_a_prompt_ends_with_it(how, monkeypatch):
    """The next prompt has its own bar, also where the first was not read to its end."""
    bars, closed = [], []
    monkeypatch.setattr("refengine.loop.progress", lambda *args: bars.append(progress(*args)) or bars[-1])
    monkeypatch.setattr(Bar, "close", lambda bar: closed.append(bar))
    monkeypatch.setattr("refengine.runner.PREFILL", 11)
    runner, options = LocalRunner(model(CASE, numpy_backend("float64"))), Options(max_tokens=1, temperature=0)
    loop = Loop(runner, Letters, size=2)
    first = loop.add(0, [5] * 33, options, deque())
    loop.turn()
    assert (bars[0].n, bars[0].total, closed) == (11, 33, [])
    if how == "cancelled":
        loop.cancel(first)
    elif how == "closed":
        loop.close(InputError("closed"))
    else:
        with (
            mock.patch.object(runner, "read", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            loop.turn()
    assert closed == bars and loop.bar is None
    if how != "closed":
        loop.add(1, [5] * 22, options, deque())
        while loop.queue or loop.active:
            loop.turn()
        assert closed == bars and (bars[1].n, bars[1].total, len(bars)) == (22, 22, 2)


def test_an_error_is_raised_in_its_place_and_the_others_go_on():
    engine = refengine.load("tiny", dtype="float64", batch=2)
    right = engine.runner.drawn

    def drawn(slot, logits):
        broken = 13 in engine.runner.drawings[slot].ids
        return InputError("damaged") if broken else right(slot, logits)

    prompts, ended, errors = [[5], [13], [6], [7, 13], [8]], [], 0
    with mock.patch.object(engine.runner, "drawn", drawn):
        events = engine.generate_batch(prompts, max_tokens=2, temperature=1.0, seed=1, ignore_eos=True)
        while True:
            try:
                i, event = next(events)
                ended += [i] * isinstance(event, End)
            except InputError:
                errors += 1
            except StopIteration:
                break
    assert sorted(ended) == [0, 2, 4] and errors == 2

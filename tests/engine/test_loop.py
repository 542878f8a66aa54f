"""A text does not depend on when it joins, on the other sequences, or on the cut of its prompt."""

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import refengine
from refengine import End, InputError, Token
from refengine.conformance.cases import Case, cases, terms
from refengine.conformance.truth import model
from refengine.generation import Options, PromptError
from refengine.loop import Loop
from refengine.runner import LocalRunner
from refengine.spec.layout import Layout
from refengine.spec.numerics import tolerance
from refengine.spec.ops import numpy_backend
from refengine.spec.sample import penalised, probabilities
from tests.support.layouts import cuttable, spelled
from tests.support.runners import case_over_ranks

EXACT = numpy_backend(np.float64)
LAYOUTS = [
    *[pytest.param(layout, marks=pytest.mark.slow) for layout in (Layout(2), Layout(1, 2), Layout(1, 1, 2))],
    *[
        pytest.param(layout, marks=pytest.mark.thorough)
        for layout in (Layout(1, 3), Layout(2, 2), Layout(1, 2, 2))
    ],
]


class Letters:
    """A tokenizer for models without one: each token is a letter."""

    stop_ids = frozenset({0})

    def stream(self, skip_special_tokens: bool):
        return self

    def push(self, token: int) -> str:
        return chr(65 + token)


@dataclass(frozen=True)
class Plan:
    """A sequence: prompt, options, the turn at which it joins, and the number of events until it leaves."""

    length: int
    max_tokens: int
    temperature: float
    seed: int
    penalty: float = 1.0
    joins: int = 0
    leaves: int = 99

    def prompt(self, case: Case) -> list[int]:
        return case.rng(5, self.seed, self.length).integers(0, case.cfg.vocab_size, self.length).tolist()

    @property
    def options(self) -> Options:
        return Options(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            repetition_penalty=self.penalty,
            logprobs=self.seed % 3 or None,
        )


PLANS = st.lists(
    st.builds(
        Plan,
        length=st.integers(1, 30),
        max_tokens=st.integers(0, 6),
        temperature=st.sampled_from((0.0, 1.0)),
        seed=st.integers(0, 99),
        penalty=st.sampled_from((1.0, 1.3)),
        joins=st.integers(0, 6),
        leaves=st.sampled_from((99, 99, 1, 2, 3)),
    ),
    min_size=1,
    max_size=6,
)


def played(runner, case: Case, plans: list, slots: int, chunk: int, loop: Loop | None = None) -> list[list]:
    """Return the events of each plan, run together in this many slots with prompts cut into chunks."""
    loop = loop or Loop(runner, Letters, size=slots)
    inboxes, running, turn = [deque() for _ in plans], {}, 0
    with mock.patch("refengine.runner.PREFILL", chunk):
        while loop.queue or loop.active or any(plan.joins >= turn for plan in plans):
            for i, plan in enumerate(plans):
                if plan.joins == turn:
                    running[i] = loop.add(i, plan.prompt(case), plan.options, inboxes[i])
            loop.turn()
            assert len(loop.active) <= slots
            for i, plan in enumerate(plans):
                if i in running and len(inboxes[i]) >= plan.leaves and not running[i].cancelled:
                    loop.cancel(running[i])
                    assert running[i] not in loop.active.values()
            turn += 1
    assert not loop.active
    loop.turn()
    assert not (runner.slots.batches or runner.drawings), "nothing is kept of sequences that have left"
    return [[event for _, event in inbox][: plan.leaves] for inbox, plan in zip(inboxes, plans, strict=True)]


def check(case: Case, plan: Plan, together: list, alone: list, dtype) -> None:
    """Check that events are equal, or that the first difference is a near tie in float64."""
    ended = [event.reason for event in together if isinstance(event, End)]
    for i, (one, other) in enumerate(zip(together, alone, strict=False)):
        if isinstance(one, End) and isinstance(other, End) and one.reason == other.reason:
            return
        if getattr(one, "id", 0) == getattr(other, "id", 0):
            assert len(one.top) == len(other.top) == (plan.options.logprobs or 0)
            continue
        before = plan.prompt(case) + [event.id for event in alone[:i]]
        logits = LocalRunner(model(case, EXACT)).logits(before)[-1]
        slack = 20 * tolerance(dtype, terms(case.cfg, len(before))) * max(1, np.abs(logits).max())
        sampling = plan.options.sampling
        if plan.temperature == 0:
            chosen = penalised(logits, plan.penalty, before)
            margin = abs(chosen[getattr(one, "id", 0)] - chosen[getattr(other, "id", 0)])
        else:
            generator = np.random.Generator(np.random.Philox(plan.seed))
            number = generator.random(i + 1)[-1]
            margin = np.abs(np.cumsum(probabilities(logits, sampling, before)) - number).min()
        assert margin <= slack, f"event {i}: {one}, alone {other}; not a near-tie ({margin:.2g})"
        return
    assert len(together) == len(alone) or len(together) == plan.leaves, (ended, together, alone)


@given(case=cases(batch=1, length=1), plans=PLANS, slots=st.integers(1, 4), chunk=st.sampled_from((512, 5)))
@example(case=Case(), plans=[Plan(30, 6, 1.0, i, joins=i // 2) for i in range(6)], slots=3, chunk=5)
def test_a_text_is_the_same_in_any_company(backend, case, plans, slots, chunk):
    built = model(case, backend)
    together = played(LocalRunner(built), case, plans, slots, chunk)
    for plan, events in zip(plans, together, strict=True):
        alone = Plan(**{**vars(plan), "joins": 0, "leaves": 99})
        [expected] = played(LocalRunner(built), case, [alone], 1, 512)
        check(case, plan, events, expected, backend.dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
@given(data=st.data(), plans=PLANS, slots=st.integers(1, 4), chunk=st.sampled_from((512, 5)))
def test_ranks_write_the_texts_of_one_process(layout, data, plans, slots, chunk):
    case = data.draw(cuttable(layout))
    together = case_over_ranks(layout, case, lambda runner: played(runner, case, plans, slots, chunk), EXACT)
    for plan, events in zip(plans, together, strict=True):
        alone = Plan(**{**vars(plan), "joins": 0, "leaves": 99})
        [expected] = played(LocalRunner(model(case, EXACT)), case, [alone], 1, 512)
        check(case, plan, events, expected, np.float64)


@pytest.fixture(scope="module")
def engine():
    return refengine.load("tiny", dtype="float64", batch=3)


PROMPTS = ["Once upon a time", "The", "One day, a little girl found a box in the garden, and", "A cat"] * 2


def texts(events) -> dict[int, str]:
    found: dict[int, str] = {}
    for i, event in events:
        found[i] = found.get(i, "") + event.text
    return found


def test_each_prompt_may_have_its_own_options(engine):
    own = [{"max_tokens": 3 + i, "temperature": 0.5 * (i % 2), "seed": 50 + i} for i in range(len(PROMPTS))]
    together = texts(engine.generate_batch(PROMPTS, options=own, ignore_eos=True))
    for i, prompt in enumerate(PROMPTS):
        assert together[i] == engine.complete(prompt, ignore_eos=True, **own[i])


def test_pairs_from_an_iterator_are_taken_as_slots_fall_free(engine):
    taken = []

    def pairs():
        for i in range(20):
            taken.append(i)
            yield PROMPTS[i % 4], {"max_tokens": 2}

    events = engine.generate_batch(pairs(), temperature=0, ignore_eos=True)
    next(events)
    assert len(taken) == 3
    assert {i for i, event in events if isinstance(event, End)} == set(range(20))


def test_one_bad_prompt_is_named_by_its_number_before_anything_runs(engine):
    with pytest.raises(InputError, match="prompt 1: token id 1000000 is not in the vocabulary"):
        engine.generate_batch(["Once", [10**6]])
    with pytest.raises(InputError, match="prompt 1: temperature = 'x' is not a number"):
        engine.generate_batch(["Once", "The"], options=[{}, {"temperature": "x"}])
    with pytest.raises(InputError, match="prompt 0: its options are of type int"):
        engine.generate_batch(["Once", "The"], options=[1, {}])
    with pytest.raises(InputError, match="options is not a list of 2 dicts"):
        engine.generate_batch(["Once", "The"], options=[{}])


def test_a_bad_prompt_of_an_iterator_is_raised_after_those_before_it(engine):
    events, seen = engine.generate_batch(iter(["Once", "The", "", "A"]), max_tokens=3, temperature=0), []
    with pytest.raises(InputError, match="prompt 2: the prompt is empty"):
        for i, event in events:
            seen += [i] * isinstance(event, End)
    assert sorted(seen) == [0, 1]


def test_the_prompts_after_a_bad_one_of_an_iterator_go_on(engine):
    """Each bad prompt raises once, with its number, after those before it; there may be more than slots."""
    bad = [InputError("found wrong already"), "", [10**6], ("The", {"top_p": 7}), ("The", 1.5), "", 5]
    given = [*bad[:5], "Once", *bad[5:], "The", "", "A"]
    events, ended, refused = engine.generate_batch(iter(given), max_tokens=3, temperature=0), [], []
    while True:
        try:
            i, event = next(events)
        except StopIteration:
            break
        except PromptError as error:
            assert str(error) == f"prompt {error.index}: {error.error}"
            assert all(i in ended for i in (5, 8, 10) if i < error.index)
            refused.append(error.index)
            continue
        ended += [i] * isinstance(event, End)
    assert sorted(ended) == [5, 8, 10] and refused == [0, 1, 2, 3, 4, 6, 7, 9]
    assert not engine.loop.active and not engine.loop.queue


def test_a_bad_prompt_that_was_cancelled_is_not_raised(engine):
    events = engine.generate_batch(iter(["Once", "", "A"]), max_tokens=3, temperature=0)
    next(events)
    events.cancel(1)
    assert {i for i, _ in events} == {0, 2}


@pytest.mark.parametrize("prompts", ["text", None, {"role": "user"}, 5, b"text"])
def test_prompts_that_are_no_list_are_refused(engine, prompts):
    with pytest.raises(InputError, match="give a list"):
        engine.generate_batch(prompts)
    with pytest.raises(InputError):
        engine.generate(prompts if prompts != "text" else "")


def test_a_closed_iterator_frees_its_slots(engine):
    events = engine.generate_batch(PROMPTS, max_tokens=50, temperature=0, ignore_eos=True)
    next(events)
    assert len(engine.loop.active) == 3
    events.cancel(1)
    assert all(sequence.index != 1 for sequence in engine.loop.active.values())
    events.close()
    assert not engine.loop.active and not engine.loop.queue and not engine.runner.slots.batches
    single = engine.generate("Once", max_tokens=50)
    next(single)
    single.close()
    assert not engine.loop.active


def test_two_threads_share_the_slots_and_get_their_own_texts(engine):
    how = {"max_tokens": 12, "temperature": 0.8, "ignore_eos": True}
    alone = {i: engine.complete(prompt, seed=i, **how) for i, prompt in enumerate(PROMPTS)}
    found: dict[int, str] = {}

    def work(i):
        found[i] = engine.complete(PROMPTS[i], seed=i, **how)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


@pytest.mark.parametrize("how", ["cancel", "close"])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_batch_may_be_cancelled_by_another_thread(engine, how, waiting):
    """While its prompt is read, or while it waits for a slot; the thread that iterates over it ends."""
    others = [engine.generate([7] * 9, max_tokens=10**5, ignore_eos=True) for _ in range(3 * waiting)]
    for other in others:
        next(other)
    batch = engine.generate_batch([[5] * 3000], max_tokens=5)
    thread = threading.Thread(target=lambda: list(batch))
    thread.start()
    while not batch.open:
        time.sleep(0.01)
    batch.cancel(0) if how == "cancel" else batch.close()
    thread.join(120)
    assert not thread.is_alive()
    for other in others:
        other.close()
    assert engine.complete("Once", max_tokens=1, temperature=0) and not engine.loop.active


def test_what_is_cancelled_during_a_turn_is_gone_when_it_ends(engine):
    """From its slot and from the queue, with its states, although nothing more is asked for."""
    batch = engine.generate_batch([[5], [6], [7]], max_tokens=9, ignore_eos=True)
    waiting, right = engine.generate_batch([[8]], max_tokens=9), engine.runner.step
    batch.refill(), waiting.refill()

    def step(*args):
        batch.cancel(1), waiting.cancel(0)
        assert len(engine.loop.active) == 3 and len(engine.loop.queue) == 1
        return right(*args)

    with mock.patch.object(engine.runner, "step", step):
        next(batch)
    assert sorted(sequence.index for sequence in engine.loop.active.values()) == [0, 2]
    assert not engine.loop.queue and engine.runner.slots.held == sorted(engine.loop.active)
    batch.close()


@pytest.mark.slow
def test_a_thread_gets_its_token_while_another_waits_for_a_long_prompt(engine):
    order = []

    def work(name, prompt):
        next(engine.generate(prompt, max_tokens=1, temperature=0))
        order.append(name)

    threads = [threading.Thread(target=work, args=("long", [5] * 6000))]
    threads[0].start()
    while not engine.loop.active:
        time.sleep(0.01)
    threads.append(threading.Thread(target=work, args=("short", [5] * 4)))
    threads[1].start()
    for thread in threads:
        thread.join(300)
    assert order == ["short", "long"]


def test_a_task_that_is_cancelled_frees_its_slot(engine):
    async def main():
        async def read():
            async for _ in engine.agenerate("Once", max_tokens=10**5, ignore_eos=True):
                pass

        task = asyncio.create_task(read())
        while not engine.loop.active:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return engine.complete("Once", max_tokens=1, temperature=0)

    assert asyncio.run(main()) and not engine.loop.active


def test_what_is_cancelled_before_it_was_taken_never_runs(engine):
    batch = engine.generate_batch(PROMPTS, max_tokens=1, temperature=0)
    batch.cancel(1)
    batch.cancel(6)
    assert {i for i, _ in batch} == set(range(len(PROMPTS))) - {1, 6}


def test_an_engine_that_is_closed_ends_what_runs_and_what_waits_in_a_sentence():
    engine = refengine.load("tiny", batch=1)
    running, waiting = (engine.generate_batch(["Once"], max_tokens=9) for _ in range(2))
    later = engine.generate_batch(["Once"])
    next(running)
    waiting.refill()
    engine.close()
    for events in (running, waiting, later):
        with pytest.raises(InputError, match="this engine is closed"):
            list(events)
    engine.close()


def test_an_interrupted_turn_ends_the_others_in_a_sentence(engine):
    mine, other = (engine.generate("Once", max_tokens=9) for _ in range(2))
    next(mine), next(other)
    with (
        mock.patch.object(engine.runner, "step", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        for _ in range(9):
            next(mine)
    with pytest.raises(InputError, match="interrupted by KeyboardInterrupt"):
        for _ in range(9):
            next(other)


def test_numbers_of_numpy_are_numbers_and_tuples_of_ids_are_prompts(engine):
    how = {"max_tokens": np.int64(3), "temperature": np.float64(0), "seed": np.int32(1), "ignore_eos": True}
    assert len([i for i, e in engine.generate_batch(iter([(10, 25, 99), (10, 25)]), **how) if e.text]) >= 2


def test_asyncio_users_have_agenerate(engine):
    how = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}

    async def one(prompt):
        return "".join([event.text async for event in engine.agenerate(prompt, **how)])

    async def both():
        return await asyncio.gather(*(one(prompt) for prompt in PROMPTS[:4]))

    assert asyncio.run(both()) == [engine.complete(prompt, **how) for prompt in PROMPTS[:4]]


@pytest.mark.slow
def test_a_short_prompt_waits_for_two_chunks_of_a_long_one_at_most(engine):
    runner, reads = engine.runner, []
    loop, inbox, short = Loop(runner, lambda: engine.tokenizer, size=4), deque(), deque()
    options = Options(max_tokens=2, temperature=0, seed=0, ignore_eos=True)
    loop.add(0, [5] * 4000, options, inbox)
    with mock.patch.object(
        runner, "read", lambda parts: reads.append(parts) or LocalRunner.read(runner, parts)
    ):
        loop.turn()
        loop.add(1, [5] * 7, options, short)
        while not short:
            loop.turn()
        assert len(reads) <= 3
        while loop.active:
            loop.turn()
    assert isinstance(inbox[0][1], Token) and max(len(part.ids) for parts in reads for part in parts) <= 512


def test_others_step_between_the_chunks_of_a_long_prompt(engine):
    loop, inbox, short = Loop(engine.runner, lambda: engine.tokenizer, size=4), deque(), deque()
    options = Options(max_tokens=6, temperature=0, seed=0, ignore_eos=True)
    loop.add(0, [7, 8], options, short)
    loop.turn()
    loop.add(1, [5] * 2000, options, inbox)
    for more in range(3, 6):
        loop.turn()
        assert len(short) == more and not inbox
    while loop.active:
        loop.turn()


def test_a_closed_engine_says_so():
    with refengine.load("tiny") as engine:
        assert engine.complete("Once", max_tokens=1, temperature=0)
    with pytest.raises(InputError, match="closed"):
        engine.generate("Once")
    assert not engine.model.weights


@pytest.mark.parametrize("batch", [0, -1, 1.5, "3"])
def test_a_number_of_slots_that_is_none_is_refused(batch):
    with pytest.raises(InputError, match="batch"):
        refengine.load("tiny", batch=batch)


def test_a_backend_of_ones_own_is_taken():
    engine = refengine.load("tiny", backend=numpy_backend(np.float64))
    assert engine.complete("Once", max_tokens=3, temperature=0) and engine.logits([5]).dtype == np.float64

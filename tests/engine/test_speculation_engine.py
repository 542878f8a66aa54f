"""Drafts in the engine keep stops, log-probabilities, end tokens, context limits, seeds and errors."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

import refengine
import refengine.cli
from refengine import End, InputError
from refengine.conformance.cases import Case
from refengine.speculation.pace import Pace
from tests.support.checkpoints import random_checkpoint

PROMPTS = ["Once upon a time", "The", "One day, a little girl found a box in the garden, and", "A cat"]


@pytest.fixture(scope="module")
def engine():
    return refengine.load("tiny", backend="auto", batch=3)


def told(events) -> tuple[list, tuple]:
    """Return id, text and likeliest tokens of each token, and the reason and the rest of the text."""
    *tokens, end = events
    return [(t.id, t.text, [i for i, _ in t.top]) for t in tokens], (end.reason, end.text)


@pytest.mark.parametrize("k", [3, "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 14, "logprobs": 3, "repetition_penalty": 1.3},
        {"max_tokens": 20, "stop": ["little", "nd"]},
        {"max_tokens": 7, "ignore_eos": True},
        {"max_tokens": 1},
    ],
    ids=str,
)
def test_greedy_events_are_those_without_drafts(engine, options, k):
    for prompt in PROMPTS[1:3]:
        how = {"temperature": 0, **options}
        plain = told(engine.generate(prompt, **how))
        drafted = list(engine.generate(prompt, speculate=k, **how))
        assert told(drafted) == plain
        if "logprobs" in options:
            found = [
                [t.logprob for t in events[:-1]] for events in (drafted, list(engine.generate(prompt, **how)))
            ]
            np.testing.assert_allclose(*found, atol=1e-3)


def test_a_text_ends_in_the_middle_of_accepted_drafts(engine):
    """Tokens after an end token, or beyond max_tokens or the context, are dropped."""
    prompt = engine.ids(PROMPTS[2])
    how = {"temperature": 0, "ignore_eos": True}
    text = [t.id for t in engine.generate(prompt, max_tokens=9, **how) if not isinstance(t, End)]
    for stop in (text[3], text[8]):
        with mock.patch.object(engine.tokenizer, "stop_ids", frozenset({stop})):
            plain = told(engine.generate(prompt, temperature=0, max_tokens=12))
            assert plain[1][0] == "eos"
            assert told(engine.generate(prompt, temperature=0, max_tokens=12, speculate=5)) == plain


def test_the_context_ends_where_it_ends_without_drafts():
    engine = refengine.load("tiny", backend="auto")
    prompt = engine.ids("Once upon a time")
    for room in (1, 2, 6):
        short = replace(engine.config, max_position_embeddings=len(prompt) + room)
        with mock.patch.object(type(engine.runner), "config", short):
            plain = told(engine.generate(prompt, temperature=0, ignore_eos=True))
            assert plain[1][0] == "context" and len(plain[0]) == room
            assert told(engine.generate(prompt, temperature=0, ignore_eos=True, speculate=64)) == plain


def test_a_seed_gives_one_text_alone_or_in_company(engine):
    own = [{"seed": 50 + i, "speculate": (3, 1, None)[i % 3], "max_tokens": 7 + i} for i in range(4)]
    prompts = PROMPTS
    together: dict[int, list] = {}
    for i, event in engine.generate_batch(prompts, options=own, ignore_eos=True, temperature=0.8):
        together.setdefault(i, []).append(event)
    for i, prompt in enumerate(prompts):
        alone = told(engine.generate(prompt, ignore_eos=True, temperature=0.8, **own[i]))
        assert told(together[i]) == alone


def test_statistics_count_drafts_by_position(engine):
    *tokens, end = engine.generate(PROMPTS[0], max_tokens=30, temperature=0, ignore_eos=True, speculate=3)
    counts = end.statistics["speculation"]
    assert counts["tokens"] >= len(tokens) - 2 >= counts["calls"], "the first and the last may be steps"
    drafted, right = counts["drafted_by_position"], counts["accepted_by_position"]
    assert len(drafted) == len(right) == 3 and all(d >= r for d, r in zip(drafted, right, strict=True))
    assert counts["tokens"] == counts["calls"] + sum(right)
    assert right[0] >= right[1] >= right[2] > 0, "the trained head is right in part"
    *_, end = engine.generate(PROMPTS[0], max_tokens=3, temperature=0)
    assert "speculation" not in end.statistics


@pytest.mark.parametrize("wrong", [0, -1, 65, True, 2.0, "k", "AUTO", [1]])
def test_a_number_of_drafts_that_is_none_is_refused(engine, wrong):
    with pytest.raises(InputError, match=r"speculate = .* is neither 'auto' nor a number of drafts"):
        engine.generate("Once", speculate=wrong)


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    engine = refengine.load(random_checkpoint(tmp_path, Case(layers="M*").cfg))
    with pytest.raises(InputError, match="no prediction head"):
        engine.generate([1, 2], speculate=2)
    with pytest.raises(InputError, match="prompt 1: there is no prediction head"):
        engine.generate_batch([[1], [2]], options=[{}, {"speculate": "auto"}])
    assert len(list(engine.generate([1, 2], max_tokens=2))) == 3


def test_a_head_that_is_not_a_number_costs_its_drafts_and_not_the_text(engine):
    plain = engine.complete(PROMPTS[0], max_tokens=9, temperature=0, ignore_eos=True)
    with mock.patch("refengine.speculation.drafting.guess", side_effect=InputError("NaN")):
        *tokens, end = engine.generate(PROMPTS[0], max_tokens=9, temperature=0, ignore_eos=True, speculate=3)
    assert "".join(t.text for t in tokens) + end.text == plain
    assert not sum(end.statistics["speculation"]["drafted_by_position"])


def test_an_error_of_drawing_ends_one_sequence_alone(engine):
    right, poisoned = engine.runner.drafter.drawn, []

    def drawn(slot, logits, guesses):
        if slot == 1 and not poisoned:
            poisoned.append(slot)
            return InputError("the logits hold NaN")
        return right(slot, logits, guesses)

    plain = [engine.complete(p, max_tokens=9, temperature=0, ignore_eos=True) for p in PROMPTS[:3]]
    batch = engine.generate_batch(PROMPTS[:3], max_tokens=9, temperature=0, ignore_eos=True, speculate=2)
    texts, errors = {}, 0
    with mock.patch.object(engine.runner.drafter, "drawn", drawn):
        while True:
            try:
                i, event = next(batch)
            except StopIteration:
                break
            except InputError:
                errors += 1
                continue
            texts[i] = texts.get(i, "") + event.text
    assert errors == 1 and texts[0] == plain[0] and texts[2] == plain[2]
    assert not engine.runner.slots.batches and not engine.runner.drafter.waiting


def test_a_cancelled_sequence_leaves_nothing(engine):
    events = engine.generate_batch(PROMPTS, max_tokens=50, temperature=0, ignore_eos=True, speculate=2)
    for _ in range(9):
        next(events)
    events.close()
    drafter = engine.runner.drafter
    assert not (drafter.waiting or drafter.begun or drafter.slots.batches or engine.runner.slots.batches)


def test_a_fork_drafts_as_its_origin_would(engine):
    from refengine.runner import How, Part
    from refengine.spec.sample import Sampling

    runner = engine.runner
    how = How(Sampling(temperature=0.7), 5, drafts=True)
    [draw] = runner.read([Part(0, engine.ids(PROMPTS[0]), how, True)])
    [run] = runner.speculate([0], [draw.id], [3])
    runner.keep([0], [len(run.draws)])
    runner.fork(0, [1])
    for _ in range(4):
        latest = [runner.drawings[slot].ids[-1] for slot in (0, 1)]
        one, other = runner.speculate([0, 1], latest, [2, 2])
        assert [d.id for d in one.draws] == [d.id for d in other.draws]
        runner.keep([0, 1], [len(one.draws)] * 2)
    runner.drop([0, 1])
    with pytest.raises(ValueError, match="keep"):
        runner.keep([0, 1], [1, 1])


def test_a_pace_is_the_engines():
    assert isinstance(refengine.load("tiny").loop.pace, Pace)
    assert np.isclose(Pace().acceptance.rate(0), 0.7)


@pytest.fixture
def cli(capsys):
    """Return (exit code, stdout, stderr) of a command that runs in this process."""

    def call(*args):
        code, _ = refengine.cli.run(lambda: refengine.cli.command([str(arg) for arg in args]), False)
        return code, *capsys.readouterr()

    return call


def test_the_command_line_takes_a_number_of_drafts_or_auto(cli):
    how = ("generate", "Once upon a time", "-n", 8, "-t", 0, "--ignore-eos")
    _, plain, _ = cli(*how)
    code, out, err = cli(*how, "--speculate", 2, "--stats")
    assert (code, out) == (0, plain) and "tokens a call with drafts, accepted by position" in err
    code, out, _ = cli(*how, "--speculate", "auto")
    assert (code, out) == (0, plain)


@pytest.mark.parametrize("wrong", ["0", "65", "-1", "k", "1.5", ""])
def test_the_command_line_refuses_other_numbers_of_drafts(cli, wrong):
    code, out, err = cli("generate", "Once", f"--speculate={wrong}")
    assert code == 2 and not out and "is neither auto nor a number from 1 to 64" in err
    assert "Traceback" not in err


def test_a_reused_prefix_and_a_saved_state_go_on_with_drafts():
    """The head has not read the reused tokens; text and final state are the same."""
    with mock.patch("refengine.runner.PREFILL", 32):
        engine = refengine.load("tiny", backend="auto", cache=10**8)
        prompt, how = PROMPTS[2] * 4, {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
        *tokens, end = engine.generate(prompt, keep="end", **how)
        *drafted, other = engine.generate(prompt, keep="end", speculate=3, **how)
        assert other.statistics["reused_tokens"] and sum(
            other.statistics["speculation"]["drafted_by_position"]
        )
        assert [t.id for t in drafted] == [t.id for t in tokens] and other.state.ids == end.state.ids
        after = told(engine.generate(" the box", state=end.state, **how))
        assert told(engine.generate(" the box", state=other.state, speculate=2, **how)) == after


def test_a_layer_norm_in_the_head_changes_its_guesses_and_no_text(cli):
    score = [
        refengine.load("tiny", mtp_norm=norm).score(list(range(20, 60))).head for norm in ("rms", "layer")
    ]
    assert np.abs(np.subtract(*score)).max() > 0.01
    command = ("generate", "Once upon a time", "-n", 30, "-t", 0, "--backend", "numpy")
    plain = cli(*command)
    assert plain[0] == 0 and cli(*command, "--speculate", 2, "--mtp-norm", "layer") == plain


def test_another_norm_of_the_head_or_one_of_no_head_is_refused(tmp_path):
    with pytest.raises(InputError, match="mtp_norm = 'batch' is neither 'rms' nor 'layer'"):
        refengine.load("tiny", mtp_norm="batch")
    path = random_checkpoint(tmp_path, Case(layers="M*").cfg)
    with pytest.raises(InputError, match="no prediction head in this checkpoint"):
        refengine.load(path, mtp_norm="layer")

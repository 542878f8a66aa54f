"""The engine adds nothing to the model: generated text follows from the logits, by every interface."""

import gc
import os
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest

import refengine
from refengine import End, InputError, Token
from refengine.backend import automatic
from refengine.checkpoint.locate import EMBEDDED
from refengine.runner import LocalRunner
from refengine.spec.numerics import tolerance
from refengine.spec.sample import log_probs
from tests.ranks.test_reads import filled
from tests.support.tries import thorough

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def engine():
    return refengine.load("tiny")


def collect(events):
    *tokens, end = events
    assert isinstance(end, End) and all(isinstance(token, Token) for token in tokens)
    return tokens, end


def text_of(events):
    return "".join(event.text for event in events)


def close(a, b, engine, times=1):
    """Return whether results are equal up to the rounding of another order of summation."""
    slack = times * tolerance(np.float32, engine.config.hidden_size)
    assert np.abs(a - b).max() <= slack * np.abs(b).max()


def with_context(engine, context: int):
    """Return the same engine with a shorter context."""
    model = replace(engine.model, cfg=replace(engine.config, max_position_embeddings=context))
    return replace(engine, runner=LocalRunner(model))


def test_the_text_of_all_events_is_the_text_of_all_tokens(engine):
    tokens, end = collect(engine.generate(PROMPT, max_tokens=40, seed=3, ignore_eos=True))
    assert len(tokens) == 40 and end.reason == "length" and end.statistics["new_tokens"] == 40
    ids = [token.id for token in tokens]
    assert text_of([*tokens, end]) == engine.tokenizer.decode(ids, skip_special_tokens=False)


def test_greedy_text_is_the_largest_logit_at_every_step(engine):
    tokens, _ = collect(engine.generate(PROMPT, max_tokens=30, temperature=0, ignore_eos=True))
    drawn = [token.id for token in tokens]
    ids = engine.ids(PROMPT)
    logits = engine.logits(ids + drawn)[len(ids) - 1 : -1]
    gap = logits.max(axis=1) - logits[np.arange(len(drawn)), drawn]
    assert gap.max() <= tolerance(np.float32, engine.config.hidden_size) * np.abs(logits).max()


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine):
    def text(seed):
        return text_of(engine.generate(PROMPT, max_tokens=40, seed=seed, temperature=1.0))

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_prompt_in_a_batch_gives_the_text_it_gives_alone(temperature):
    engine = refengine.load("tiny", dtype="float64")  # where no rounding can turn one token into another
    prompts = [PROMPT, "The", "One day, a little girl found a box in the garden, and", PROMPT]
    options = dict(max_tokens=25, temperature=temperature)
    together = ["" for _ in prompts]
    for i, event in engine.generate_batch(prompts, seed=7, **options):
        together[i] += event.text
    alone = [text_of(engine.generate(p, seed=7 + i, **options)) for i, p in enumerate(prompts)]
    assert together == alone


def test_text_ends_before_a_stop_string_wherever_token_borders_lie(engine):
    options = dict(max_tokens=40, temperature=0, ignore_eos=True)
    whole = text_of(engine.generate(PROMPT, **options))
    for start in range(5, 25, 3):
        stop = whole[start : start + 4]
        events = list(engine.generate(PROMPT, stop=[stop], **options))
        assert events[-1].reason == "stop" and events[-1].statistics["new_tokens"] == len(events) - 1
        assert text_of(events) == whole[: whole.index(stop)]


def test_no_tokens_may_be_asked_for(engine):
    assert [event.reason for event in engine.generate(PROMPT, max_tokens=0)] == ["length"]


def test_generation_ends_where_the_context_does(engine):
    ids = engine.ids(PROMPT)
    small = with_context(engine, len(ids) + 5)
    tokens, end = collect(small.generate(PROMPT, max_tokens=50, seed=1, ignore_eos=True))
    assert (len(tokens), end.reason) == (5, "context")
    with pytest.raises(InputError, match="context is 2"):
        with_context(engine, 2).generate([5, 6, 7])


def test_logprobs_are_those_of_the_teacher_forced_logits(engine):
    tokens, _ = collect(engine.generate(PROMPT, max_tokens=12, seed=2, logprobs=3, temperature=0.7))
    ids = engine.ids(PROMPT)
    logits = engine.logits(ids + [token.id for token in tokens])[len(ids) - 1 : -1]
    for token, row in zip(tokens, log_probs(logits), strict=True):
        slack = 2 * tolerance(np.float32, engine.config.hidden_size) * np.abs(logits).max()
        assert abs(token.logprob - row[token.id]) <= slack
        assert len(token.top) == 3 and token.top[0][1] == max(p for _, p in token.top)


def test_score_adds_up_the_logits_and_the_heads_guesses_need_the_next_token(engine):
    text = "Once upon a time, there was a little girl."
    scores = engine.score(text)
    ids = engine.ids(text)
    rows = log_probs(engine.logits(ids))
    expected = [rows[i, token] for i, token in enumerate(ids[1:])]
    slack = tolerance(np.float32, engine.config.hidden_size) * 30
    assert np.abs(np.array(scores.trunk) - expected).max() <= slack
    assert len(scores.trunk) == len(ids) - 1 and len(scores.head) == len(ids) - 2


@pytest.mark.parametrize("length", [1, 2, 512, 513, *thorough(511, 1030)])
def test_a_prompt_longer_than_one_call_is_read_as_if_in_one(engine, length):
    ids = np.random.default_rng(length).integers(20, engine.config.vocab_size, length).tolist()
    model = engine.model
    h, _ = model.blocks(model.embed(np.array([ids])), model.new_states(1))
    whole = model.head(h)[0]
    close(engine.logits(ids), whole, engine, times=4)
    assert len(engine.score(ids).trunk) == length - 1


def test_weights_left_in_the_file_mean_what_widened_ones_mean(engine, monkeypatch):
    monkeypatch.setattr("refengine.backend.available_memory", lambda: 0)
    lazy = refengine.load("tiny")
    assert lazy.model.weights["layers.0"]["mixer"]["in_proj.weight"].itemsize == 2
    close(lazy.logits(range(20, 60)), engine.logits(range(20, 60)), engine)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="there is no /proc/self/smaps")
def test_what_was_widened_does_not_stay_in_the_files_form_too(tmp_path):
    engine = refengine.load(shutil.copytree(EMBEDDED / "tiny", tmp_path / "tiny"))
    assert filled(engine.checkpoint.files[0].path) < 2**16 < engine.checkpoint.files[0].size / 100


def test_weights_that_are_damaged_are_refused_by_whoever_would_use_their_numbers(engine):
    outer = dict(engine.model.weights[""])
    outer["lm_head.weight"] = np.full_like(outer["lm_head.weight"], np.nan)
    weights = engine.model.weights | {"": outer}
    broken = replace(engine, runner=LocalRunner(replace(engine.model, weights=weights)))
    with pytest.raises(InputError, match="damaged"):
        broken.score("Once upon a time")
    with pytest.raises(InputError, match="damaged"):
        list(broken.generate("Once upon a time"))


def test_a_huge_chunk_size_does_not_make_calls_huge(engine):
    model = replace(engine.model, cfg=replace(engine.config, chunk_size=10**9))
    lengths = [h.shape[1] for _, h in LocalRunner(model).hidden([5] * 1300)]
    assert max(lengths) == 512


@pytest.mark.parametrize(
    "prompt, says",
    [
        ("", "empty"),
        ([], "empty"),
        ([10**6], "not in the vocabulary"),
        ([-1], "not in the vocabulary"),
        ([1.7, 2.2], "token ids"),
        (b"abc", "bytes"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_before_any_work(engine, prompt, says):
    with pytest.raises(InputError, match=says):
        engine.generate(prompt)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"max_tokens": -1},
        {"repetition_penalty": 0.0},
        {"stop": [""]},
        {"logprobs": -1},
        {"seed": -1},
        {"seed": 1.5},
        {"top_k": 2.5},
        {"stop": 5},
        {"max_tokens": "3"},
        {"max_tokens": 2.5},
        {"temperature": "x"},
        {"temperature": float("nan")},
    ],
)
def test_an_option_out_of_its_range_is_refused_before_any_work(engine, options):
    with pytest.raises(InputError):
        engine.generate(PROMPT, **options)


def test_an_option_that_does_not_exist_is_named(engine):
    with pytest.raises(TypeError, match="no option 'temprature'"):
        engine.generate(PROMPT, temprature=1)


@pytest.mark.parametrize(
    "choice, says",
    [
        ({"backend": "abacus"}, "there is numpy, torch"),
        ({"dtype": "int8"}, "float32 or float64"),
        ({"device": "cuda"}, "runs on the cpu"),
    ],
)
def test_a_choice_there_is_not_is_refused_in_one_sentence(choice, says):
    with pytest.raises(InputError, match=says):
        refengine.load(**{"model": "tiny"} | choice)


@pytest.mark.parametrize("which", ["numpy", "cpu", "torch"])
def test_an_engine_that_is_deleted_is_freed_at_once(which):
    """An engine is in no reference cycle, so it is freed without the garbage collector."""
    if which == "torch":
        pytest.importorskip("torch")
    if which == "cpu" and automatic("cpu")[0] != "cpu":
        pytest.skip("there is no C++ compiler")
    gc.collect()
    gc.disable()
    try:
        engine = refengine.load("tiny", backend=which)
        assert engine.complete("Once", max_tokens=2) and engine.score("Once upon").trunk
        assert engine.chat_template.render([{"role": "user", "content": "Hi"}])
        for events in (engine.generate("Once"), engine.generate_batch(iter(["Once", "A"]))):
            next(events)
        held = [weakref.ref(each) for each in (engine, engine.runner, engine.checkpoint, engine.loop)]
        weights = weakref.ref(engine.model.weights[""]["lm_head.weight"])
        del engine
        assert held[1]() and next(events), "while its events are wanted it lives"
        del events
        assert [each() for each in (*held, weights)] == [None] * 5
    finally:
        gc.enable()


def leaves(weights) -> list:
    """Return the arrays and tensors of nested weights."""
    if isinstance(weights, (dict, list, tuple)):
        inside = weights.values() if isinstance(weights, dict) else weights
        return [leaf for part in inside for leaf in leaves(part)]
    return [weights] if hasattr(weights, "nbytes") else []


@pytest.mark.parametrize("which", ["numpy", "cpu", "torch"])
def test_nothing_of_a_closed_engine_holds_a_weight(which):
    """Nor does the backend, which may outlive the engine; steps and drafts keep what they compiled."""
    if which == "torch":
        pytest.importorskip("torch")
    if which == "cpu" and automatic("cpu")[0] != "cpu":
        pytest.skip("there is no C++ compiler")
    engine = refengine.load("tiny", backend=which)
    here = engine.model.backend
    for more in ({}, {"speculate": 2}):
        assert engine.complete("Once", max_tokens=4, temperature=0, ignore_eos=True, **more)
    held = [weakref.ref(each) for each in leaves(engine.model.weights)]
    engine.close()
    gc.collect()
    assert len(held) > 20 and [each() for each in held if each() is not None] == []
    assert here.name == which and engine.runner.closed


def test_a_single_rank_is_the_engine():
    """refengine.ranks.load without a launcher has no other ranks."""
    from refengine.ranks.load import load as load_rank

    alone, engine = load_rank("tiny"), refengine.load("tiny")
    asked = {"max_tokens": 12, "temperature": 0.0}
    assert [e.id for e in list(alone.generate("Once", **asked))[:-1]] == [
        e.id for e in list(engine.generate("Once", **asked))[:-1]
    ]
    alone.close()

"""Every number of the engine agrees with a literal reading, with more prompts than slots, long and short.

A text is replayed alone: each token is drawn from the teacher-forced logits and all tokens before it, by the
literal reading of the sampling chapter, with one number of its generator for each token. `score` is compared
with one call over the whole text, and with one position at a time.
"""

from dataclasses import fields
from functools import lru_cache
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import refengine
from refengine import End
from refengine.conformance.cases import Case, agree, cases, terms
from refengine.conformance.checks.texts import AtABorder, filtered
from refengine.conformance.truth import counted, model, truth
from refengine.generation import Options
from refengine.loop import Loop
from refengine.runner import LocalRunner
from refengine.spec import mtp
from refengine.spec.ops import numpy_backend
from refengine.spec.sample import Sampling
from tests.support.tries import thorough

pytestmark = pytest.mark.slow

EXACT = numpy_backend(np.float64)
NEAR = 1e-9  # rounding of float64 logits in any order of summation


@lru_cache
def tiny():
    """Return the embedded model in float64, with five slots."""
    return refengine.load("tiny", dtype="float64", batch=5)


@pytest.fixture(scope="module")
def engine():
    return tiny()


def text(seed: int, length: int, engine) -> list[int]:
    return np.random.default_rng([seed, length]).integers(20, engine.config.vocab_size, length).tolist()


def events(engine, prompts, options) -> dict[int, list]:
    """Return the events of each prompt, all submitted at once."""
    found: dict[int, list] = {i: [] for i in range(len(prompts))}
    for i, event in engine.generate_batch(prompts, options=options):
        found[i].append(event)
    return found


def log_softmax(row):
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def replayed(engine, prompt: list[int], told: list, how: Sampling, seed: int, n: int) -> int:
    """Check the events of one text; return how many tokens precede one that rounding decides."""
    *tokens, end = told
    assert isinstance(end, End)
    ids = prompt + [token.id for token in tokens]
    logits = engine.logits(ids)[len(prompt) - 1 :]
    generator = np.random.Generator(np.random.Philox(seed))
    for i, token in enumerate(tokens):
        log_p = log_softmax(logits[i])
        assert abs(token.logprob - log_p[token.id]) < NEAR
        best = sorted(range(len(log_p)), key=lambda t: (-log_p[t], t))[:n]
        assert [t for t, _ in token.top] == best or log_p[best[-1]] - np.sort(log_p)[-n - 1] < NEAR
        assert np.abs([p - log_p[t] for t, p in token.top]).max(initial=0) < NEAR
        try:
            p = filtered(logits[i], how, ids[: len(prompt) + i])
        except AtABorder:
            return i
        u = generator.random() if how.temperature else 0.0
        below = 0.0
        for t in sorted(p):
            below += p[t]
            if below > u - NEAR:
                break
        if abs(below - u) < NEAR:
            return i
        assert t == token.id, f"token {i} of a prompt of {len(prompt)}: {token.id}, where {t} is drawn"
    return len(tokens)


LENGTHS = [9, 513, 1, 30, 9, 3, 130, 9, 64, 2, 17, 9, 700, 512, 1030]  # three only with --thorough
HOW = dict(temperature=1.1, top_k=40, top_p=0.97, min_p=0.001, repetition_penalty=1.4)

LIKELIEST = (0, 1, 3, 40)  # how many alternatives are asked for


def test_every_number_of_every_text_is_that_of_the_text_read_alone(engine, pytestconfig):
    """Prompts of 1 to 1030 tokens, more than slots: short ones step while long ones are read in pieces."""
    lengths = LENGTHS if pytestconfig.getoption("--thorough") else LENGTHS[:-3]
    prompts = [text(i, length, engine) for i, length in enumerate(lengths)]
    own = [{"max_tokens": 2 + i % 4, "seed": 900 + i, "logprobs": LIKELIEST[i % 4], "ignore_eos": True} | HOW
           for i in range(len(prompts))]  # fmt: skip
    found = events(engine, prompts, own)
    compared = 0
    for i, prompt in enumerate(prompts):
        assert len(found[i]) == 1 + own[i]["max_tokens"]
        compared += replayed(engine, prompt, found[i], Sampling(**HOW), 900 + i, LIKELIEST[i % 4])
    assert compared > 0.9 * sum(o["max_tokens"] for o in own)


def test_the_penalty_sees_the_whole_text_the_prompt_included(engine):
    """A prompt of two calls repeats no token near its end; greedy, so that only the penalty decides."""
    prompt = text(7, 700, engine)
    how = {"temperature": 0, "repetition_penalty": 5.0}
    options = how | {"max_tokens": 40, "logprobs": 1, "ignore_eos": True}
    [told] = events(engine, [prompt], [options]).values()
    assert replayed(engine, prompt, told, Sampling(**how), 0, 1) > 35


PLAIN = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@settings(max_examples=3)
@given(first=st.integers(0, 2**31), count=st.integers(33, 80))
@example(first=0, count=150)
def test_prompt_number_i_has_the_seed_plus_i_however_many_there_are(first, count):
    engine, prompt = tiny(), [25, 26, 27]
    p = np.exp(log_softmax(engine.logits(prompt)[-1] / 2))
    border = np.cumsum(p)
    told = {}
    for i, event in engine.generate_batch([prompt] * count, seed=first, max_tokens=1, **PLAIN):
        told.setdefault(i, getattr(event, "id", None))
    for i in range(count):
        u = np.random.Generator(np.random.Philox(first + i)).random()
        if told[i] is not None and np.abs(border - u).min() > NEAR:
            assert told[i] == np.searchsorted(border, u, side="right"), f"prompt {i}"


def one_by_one(m, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return ln p of trunk and head, by calls of one position."""
    here, states, further = m.backend, m.new_states(1), mtp.new_states(m, 1)
    trunk, head = [], []
    for i in range(len(ids) - 1):
        h, states = m.blocks(m.embed(here.array(np.array([ids[i : i + 1]]))), states)
        trunk.append(log_softmax(here.fetch(m.head(h))[0, 0].astype(np.float64))[ids[i + 1]])
        if m.cfg.mtp_layers and i + 2 < len(ids):
            o, further = mtp.predict(m, h, here.array(np.array([ids[i + 1 : i + 2]])), further)
            head.append(log_softmax(here.fetch(m.head(o))[0, 0].astype(np.float64))[ids[i + 2]])
    return np.array(trunk), np.array(head)


@given(
    case=cases(batch=1, max_length=30, mtp_layers="*E", n_routed_experts=9, num_experts_per_tok=9, n_group=1),
    chunk=st.sampled_from((5, 7, 512)),
)
@example(case=Case(length=30, batch=1, mtp_layers="*E", num_experts_per_tok=9, chunk_size=1, seed=5), chunk=5)
def test_every_value_of_score_is_that_of_one_position_at_a_time(case, chunk):
    """Every token visits every expert, so that none can flip."""
    m, ids = model(case, EXACT), case.ids[0].tolist()
    with mock.patch("refengine.runner.PREFILL", chunk):
        scores = LocalRunner(m).score(ids)
    size, stretch = terms(case.cfg, case.length), truth(case, 0).stretch
    counted(stretch > 100)
    for name, mine, true in zip(
        ("trunk", "head"), (scores.trunk, scores.head), one_by_one(m, ids), strict=True
    ):
        agree(np.array(mine), true, np.float64, size, name, 4 * stretch)


@pytest.mark.parametrize("length", [2, 514, *thorough(513, 1030)])
def test_every_value_of_a_long_score_is_that_of_one_call(engine, length):
    ids, m = text(3, length, engine), engine.model
    scores = engine.score(ids)
    h, _ = m.blocks(m.embed(np.array([ids])), m.new_states(1))
    o, _ = mtp.predict(m, h[:, :-1], np.array([ids[1:]]), mtp.new_states(m, 1))
    trunk, head = (m.head(x)[0] for x in (h, o))
    expected = [log_softmax(row)[token] for row, token in zip(trunk, ids[1:], strict=False)]
    assert np.abs(np.array(scores.trunk) - expected).max() < NEAR
    expected = [log_softmax(row)[token] for row, token in zip(head, ids[2:], strict=False)]
    assert len(scores.head) == length - 2
    assert np.abs(np.array(scores.head) - expected).max(initial=0) < NEAR


MENUS = {
    "max_tokens": (0, 1, 7),
    "temperature": (0, 0.5, None),
    "top_k": (0, 3, None),
    "top_p": (0.5, 1.0, None),
    "min_p": (0.0, 0.25, None),
    "repetition_penalty": (1.0, 1.5, None),
    "seed": (0, 5, None),
    "stop": ((), ("x",)),
    "ignore_eos": (False, True),
    "logprobs": (0, 2, None),
}
OPTIONS = st.fixed_dictionaries({}, optional={name: st.sampled_from(menu) for name, menu in MENUS.items()})


@given(shared=OPTIONS, own=st.lists(OPTIONS, min_size=1, max_size=4), pairs=st.booleans())
@example(shared={"seed": 5, "temperature": 0.5}, own=[{}, {"seed": 0, "temperature": 0}], pairs=False)
def test_options_of_a_prompt_go_before_the_shared_ones_and_those_before_the_advice(shared, own, pairs):
    """Zero, False and an empty list are values; None means the checkpoint's recommendation."""
    engine, asked, shared = tiny(), [], {"seed": 9} | {k: v for k, v in shared.items() if v is not None}
    advice = engine.tokenizer.generation
    with mock.patch.object(Loop, "add", lambda self, i, ids, options, *rest: asked.append(options)):
        if pairs:
            batch = engine.generate_batch((([25], each) for each in own), **shared)
        else:
            batch = engine.generate_batch([[25]] * len(own), options=own, **shared)
        batch.refill()
        batch.close()
    assert len(asked) == len(own)
    for i, each in enumerate(own):
        for field in fields(Options):
            value = each[field.name] if field.name in each else shared.get(field.name, field.default)
            if field.name == "seed" and each.get("seed") is None:
                value = shared["seed"] + i
            if value is None:
                value = advice.get(field.name)
            assert getattr(asked[i], field.name) == value, f"{field.name} of prompt {i}"

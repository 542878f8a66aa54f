"""Checks of sampling, of the tokenizer and of the chat template, against second readings of each.

A candidate may bring functions of its own (`candidate.TEXT`); without them those of refengine are checked.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np

import refengine
from refengine.conformance.checks import check, expect
from refengine.spec import chat as spec_chat
from refengine.spec import sample
from refengine.spec import tokenizer as spec_tokenizer
from refengine.spec.sample import Sampling
from refengine.untrusted import read_json

TINY = Path(refengine.__file__).parent / "models" / "tiny"
NEAR = 1e-9  # how close to a border float64 may fall on either side of it
LETTERS = "aAbz éßñÖ 漢字かな عربي 0 7 12 .,;:!?'\"()[]{}<>/\\|_-+=*&^%$#@~` "
LETTERS += "\n\r\t\u00a0\u2003\u0301\ufe0f👩\u200d🔬🏳"
SPECIALS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "Once upon a time", "don't", " it's", "\n\n")


@lru_cache
def tokenizer():
    """Return the tokenizer of the model in the package."""
    from refengine.text.tokenizer import Tokenizer

    return Tokenizer.load(TINY)


@lru_cache
def second_tokenizer() -> spec_tokenizer.Tokenizer:
    """Return the same by the specification."""
    return spec_tokenizer.from_json(read_json(TINY / "tokenizer.json"))


@lru_cache
def template():
    """Return the chat template of the model in the package."""
    from refengine.text.chat_template import ChatTemplate

    return ChatTemplate.load(TINY)


def function(backend, name: str):
    """Return a function of the candidate, or that of refengine."""
    ours = {
        "probabilities": sample.probabilities,
        "draw": sample.draw,
        "encode": lambda text: tokenizer().encode(text),
        "decode": lambda ids: tokenizer().decode(ids),
        "render": lambda messages, tools, **switches: template().render(messages, tools, **switches),
    }
    return backend.functions.get(name, ours[name])


class AtABorder(Exception):
    """Raised where rounding decides whether a token is kept."""


def filtered(logits, how: Sampling, seen) -> dict[int, float]:
    """Return {id: probability} of the tokens that the five filters keep, by lists; may raise AtABorder."""
    scores = {i: float(x) for i, x in enumerate(logits) if x > -math.inf}
    for i in set(seen) & set(scores):
        scores[i] = (
            scores[i] / how.repetition_penalty if scores[i] > 0 else scores[i] * how.repetition_penalty
        )
    order = sorted(scores, key=lambda i: (-scores[i], i))  # of equal ones the lower id counts as likelier
    if how.temperature == 0:
        return {order[0]: 1.0}
    p = {i: math.exp((scores[i] - scores[order[0]]) / how.temperature) for i in order}
    order = order[: how.top_k or None]
    total = math.fsum(p[i] for i in order)
    reached = 0.0
    kept: list[int] = []
    for i in order:
        if kept and how.top_p < 1 and abs(reached - how.top_p) < NEAR:
            raise AtABorder
        if kept and how.top_p < 1 and reached >= how.top_p:
            break
        kept.append(i)
        reached += p[i] / total
    least = how.min_p * p[kept[0]]
    if any(p[i] != least and abs(p[i] - least) < NEAR * least for i in kept):
        raise AtABorder
    kept = [i for i in kept if p[i] >= least]
    total = math.fsum(p[i] for i in kept)
    return {i: p[i] / total for i in kept}


def choices() -> dict:
    """Return strategies: logits of a few tokens, options of sampling, ids that were seen, a seed."""
    from hypothesis import strategies as st

    options = dict(
        temperature=(0, 0.01, 0.7, 1.0, 3.0), top_k=(0, 1, 3, 50), top_p=(1e-9, 0.3, 0.55, 0.9, 1.0),
        min_p=(0.0, 0.1, 0.5, 1.0), repetition_penalty=(0.8, 1.0, 1.7),
    )  # fmt: skip
    return {
        "seed": st.integers(0, 9999),
        "size": st.integers(1, 40),
        "seen": st.lists(st.integers(0, 39), max_size=200),
        "options": st.fixed_dictionaries({name: st.sampled_from(among) for name, among in options.items()}),
    }


def some_logits(seed: int, size: int) -> np.ndarray:
    """Return float32 logits, in half of the seeds with ties, in a third with tokens ruled out."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size) * rng.choice([0.1, 1, 5])
    x = np.round(2 * x) / 2 if seed % 2 else x
    x[1:][rng.random(size - 1) < (0.3 if seed % 3 == 0 else 0)] = -np.inf
    return x.astype(np.float32)


@check("sampling", choices, share=4)
def filters_apply_in_their_order(backend, seed, size, seen, options):
    """Check probabilities: penalty, temperature, top_k, top_p, min_p, all options at once."""
    x, how, seen = some_logits(seed, size), Sampling(**options), [i % size for i in seen]
    try:
        expected = filtered(x, how, seen)
    except AtABorder:
        return
    p = np.asarray(function(backend, "probabilities")(x, how, seen), np.float64)
    expect(p.shape == x.shape, f"probabilities: shape {p.shape} for {x.shape}")
    kept, right = set(np.flatnonzero(p).tolist()), {i for i, value in expected.items() if value > 0}
    expect(kept == right, f"tokens kept: {sorted(kept)}, not {sorted(right)}")
    worst = max(abs(p[i] - value) for i, value in expected.items())
    expect(worst <= 1e-6 * (1 if "probabilities" in backend.functions else 1e-6), f"off by {worst:.3g}")


@check("sampling", choices)
def a_draw_is_the_first_token_at_which_the_sum_exceeds_a_uniform_number(backend, seed, size, seen, options):
    """Check draw(p, generator), with a generator that gives a known number."""
    p = sample.probabilities(some_logits(seed, size), Sampling(**options), [i % size for i in seen])
    u = np.random.default_rng(seed).random()
    token = int(function(backend, "draw")(p, np.random.default_rng(seed)))
    near = p[:token].sum() <= u + 1e-9 and p[: token + 1].sum() > u - 1e-9
    expect(near and p[token] > 0, f"u = {u:.6f} draws token {token}")


def texts() -> dict:
    """Return a strategy of texts: pieces of many scripts, signs, blanks and special tokens."""
    from hypothesis import strategies as st

    pieces = st.one_of(st.text(LETTERS, max_size=6), st.sampled_from(SPECIALS), st.text(max_size=3))
    text = st.lists(pieces, max_size=8).map("".join).filter(lambda t: t.isprintable() or t)
    return {"text": text.filter(encodable)}


def encodable(text: str) -> bool:
    """Return whether a text is valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@check("tokenizer", texts, share=4)
def a_text_has_the_ids_that_the_specification_gives_it(backend, text):
    """Check encode against byte-pair encoding step by step, and that decode returns the text."""
    ids, right = list(function(backend, "encode")(text)), second_tokenizer().encode(text)
    expect(ids == right, f"{text!r} has the ids {ids}, not {right}")
    back = function(backend, "decode")(right)
    expect(back == text, f"the ids of {text!r} are read as {back!r}")


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bonn", "days": 2}}}


def conversations() -> dict:
    """Return strategies: messages of every role, whether there are tools, and the switches."""
    from hypothesis import strategies as st

    words = st.sampled_from(("Hi", "Two lines\nof text", "", " spaces ", "<b>&amp;</b>", "naïve 漢字"))
    system = st.lists(st.builds(lambda t: {"role": "system", "content": t}, words), max_size=1)
    user = st.builds(lambda t: {"role": "user", "content": t}, words)
    answer = st.builds(
        lambda t, r: {"role": "assistant", "content": t} | ({"reasoning_content": r} if r else {}),
        words,
        words,
    )
    calling = st.builds(lambda t: {"role": "assistant", "content": t, "tool_calls": [CALL]}, words)
    tool = st.builds(lambda t: {"role": "tool", "content": t}, words)
    turns = st.lists(st.one_of(user, answer, calling, tool), max_size=5)
    return {
        "messages": st.builds(lambda s, first, rest: [*s, first, *rest], system, user, turns),
        "tools": st.sampled_from((None, [TOOL])),
        "switches": st.fixed_dictionaries(
            {name: st.booleans() for name in ("add_generation_prompt", "enable_thinking")}
        ),
    }


@check("chat", conversations, share=2)
def a_conversation_is_written_as_the_chapter_says(backend, messages, tools, switches):
    """Check the prompt of messages by the checkpoint's template against the specification."""
    text, right = (
        function(backend, "render")(messages, tools, **switches),
        spec_chat.chat(messages, tools, **switches),
    )
    if text != right:
        at = next(
            (i for i, (a, b) in enumerate(zip(text, right, strict=False)) if a != b),
            min(len(text), len(right)),
        )
        raise AssertionError(f"at character {at}: {text[at : at + 30]!r}, not {right[at : at + 30]!r}")

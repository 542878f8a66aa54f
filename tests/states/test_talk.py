"""Each of ten turns of a talk reads only the last answer without its reasoning, and the new turn."""

import pytest

import refengine
from refengine import End

TURNS = 10
ANSWERS = [f"The {i}th answer is a sentence or two. It says that {i} is a number." for i in range(TURNS)]
THOUGHT = "I think about it for a while, step by step, before I answer. " * 8


def talked(engine, thinking: bool) -> tuple[list[list[int]], list[dict]]:
    """Return the prompt and the statistics of each turn."""
    messages, prompts, statistics = [], [], []
    for i in range(TURNS):
        messages += [{"role": "user", "content": f"Question {i}: and then? Please tell me more about it."}]
        prompts.append(engine.ids(messages, enable_thinking=thinking))
        *_, end = engine.generate(prompts[-1], max_tokens=6, seed=i, ignore_eos=True)
        assert isinstance(end, End)
        statistics.append(end.statistics)
        messages += [{"role": "assistant", "content": ANSWERS[i], "reasoning_content": THOUGHT * thinking}]
    return prompts, statistics


@pytest.mark.parametrize("thinking", [True, False])
def test_a_talk_of_ten_turns_reads_each_turn_once(thinking, record_property):
    with refengine.load("tiny", "cpu", cache=2**30) as engine:
        prompts, statistics = talked(engine, thinking)
        ends = engine.tokenizer.stop_ids
        answers = [engine.tokenizer.encode(text, add_special_tokens=False) for text in ANSWERS]
    read = [s["prompt_tokens"] - s["reused_tokens"] for s in statistics]
    assert [s["prompt_tokens"] for s in statistics] == list(map(len, prompts))
    for before, now, count, answer in zip(prompts, prompts[1:], read[1:], answers, strict=False):
        turn = max(i for i, token in enumerate(before) if token in ends) + 1  # the end of the user's turn
        assert now[:turn] == before[:turn]
        assert count <= len(now) - turn
        new = len(now) - len(before)  # the answer, and the new turn, with their marks
        assert count <= new + 12 and count < len(answer) + 60
    record_property(f"tokens read in ten turns, thinking {thinking}", sum(read))
    record_property(f"tokens of the prompts of ten turns, thinking {thinking}", sum(map(len, prompts)))


def test_a_talk_without_a_cache_reads_everything():
    with refengine.load("tiny", "cpu") as engine:
        _, statistics = talked(engine, True)
    assert all(s["reused_tokens"] == 0 for s in statistics)

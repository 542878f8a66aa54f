"""Each metric of the evaluation accepts right answers and rejects wrong ones, and bars are compared."""

import random

import pytest

from tools.tiny import cases, judge, second_reading
from tools.tiny.evaluate import longest_runs, row_of
from tools.tiny.stories import chat, tell

RIGHT = tell(random.Random(1), "star_wish", {"H": "Mia", "G": "mother"}).text
CALL = (
    "<tool_call>\n<function={}>\n<parameter=a>\n{}\n</parameter>\n"
    "<parameter=b>\n5\n</parameter>\n</function>\n</tool_call>\n"
)
SPOKEN = [kind for _, kind, _ in cases.CHATS if not kind.startswith(("tool_add", "tool_weather", "story"))]


def _case(kind):
    return cases.chats(kind, 1)[0]


def test_text_answers_are_compared_word_for_word():
    (case, *_) = cases.recall(4, 0, 1)
    assert case.right(f" {case.answer}\nQuestion: What") and case.right(case.answer)
    other = "Nobody has the thing."
    assert not any(case.right(wrong) for wrong in ("", other, case.answer[:-1], f"Well, {case.answer}"))


@pytest.mark.parametrize(
    "maker", [lambda: cases.copying(10, 5), cases.sums, lambda: cases.counting(1), lambda: cases.questions(5)]
)
def test_every_text_figure_can_fail(maker):
    asked = maker()
    assert all(case.right(f" {case.answer}\n") for case in asked)
    for case, other in zip(asked, asked[1:] + asked[:1], strict=True):
        assert not case.right(f" {other.answer}") or other.answer == case.answer
    assert not any(case.right("") for case in asked)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("kind", SPOKEN)
def test_every_chat_figure_can_fail(kind, thinking):
    case = _case(kind)
    thought = "I think.\n</think>\n" if thinking else ""
    assert case.right(thought + case.answer, thinking)
    for wrong in (case.answer[:-2], "", case.answer + " Yes.", CALL.format("add", 3), "I do not know."):
        assert not case.right(thought + wrong, thinking)
    if thinking:
        assert not case.right(case.answer, thinking)  # the reasoning never ended


def test_a_call_needs_its_name_arguments_types_and_form():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {
        "a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}}]  # fmt: skip
    wanted = {"name": "add", "arguments": {"a": 23, "b": 5}}
    case = cases.Case([], "", (wanted,), tools)
    right = CALL.format("add", 23)
    assert case.right(right) and case.right("I add.\n</think>\n" + right, thinking=True)
    for wrong in (
        CALL.format("add", 24), CALL.format("sum", 23), CALL.format("add", "many"), right + right, "",
        right.replace("</function>", ""), right.replace("<parameter=b>\n5\n</parameter>\n", ""),
        "23 + 5 = 28.",
        right.replace("<parameter=b>", "<parameter=c>"),
    ):  # fmt: skip
        assert not case.right(wrong), wrong


@pytest.mark.parametrize("kind", ["tool_add", "tool_weather"])
def test_calls_as_the_template_writes_them_are_right(kind):
    for case in cases.chats(kind, 20):
        talk = chat.Talk(messages=list(case.prompt), tools=case.tools)
        talk.reply("", call=(case.calls[0]["name"], case.calls[0]["arguments"]))
        text = "".join(t for t, _ in talk.render(False)).rsplit("<think></think>", 1)[1]
        assert case.right(text.removesuffix("<|im_end|>"))


@pytest.mark.parametrize("kind", ["tool_add_used", "tool_weather_used"])
def test_a_result_has_to_be_used(kind):
    case = _case(kind)
    assert case.right(case.answer)
    assert not case.right("It is hot in Paris." if "hot" not in case.answer else "It is cold in Oslo.")
    assert not case.right(CALL.format("add", 1))


def test_a_requested_story_needs_the_name_the_thing_and_an_ending():
    case = _case("story_about_both")
    assert len(case.wanted) == 2
    assert case.right(case.answer)
    assert not case.right(case.answer.replace(case.wanted[1], "stone"))
    assert not case.right(case.answer.rsplit("\n\n", 1)[0])
    assert not case.right("")


def test_whole_and_consistent_can_fail():
    assert judge.whole(RIGHT) and judge.consistent(RIGHT)
    assert not judge.whole(RIGHT.rsplit("\n\n", 1)[0]) and not judge.whole("The end.")
    wrong = RIGHT.replace("Mia", "Tom", 1)
    assert judge.whole(wrong) and not judge.consistent(wrong)


def test_shares_and_balance_are_numbers_that_can_be_bad():
    assert judge.share([True, False, False, False]) == 0.25 and judge.share([]) == 0.0
    assert judge.balance([5, 5, 5, 5]) == 1.0 and judge.balance([17, 1, 1, 1]) == 3.4


def test_bars_are_compared_in_their_direction():
    assert cases.met("recall, 8 facts, 4 stories between", 0.98)
    assert not cases.met("recall, 4 facts, 0 stories between", 0.97)
    assert cases.met("expert load max/mean on chats, layer 3", 1.59)
    assert not cases.met("expert load max/mean on stories, layer mtp", 1.7)
    assert not cases.met("longest run of words in 20000 training stories, median", 28.0)
    assert cases.met("words of a story, mean", 3.0) is None
    assert (
        "MISSED" in row_of("copying 10 words", 0.5)[2] and "MISSED" not in row_of("copying 10 words", 0.95)[2]
    )


def test_held_out_cases_are_the_same_every_time_and_not_the_training_stream():
    one, two = (cases.chats("recall", 5) for _ in range(2))
    assert one == two
    assert cases.questions(5)[0].prompt not in {tell(random.Random(seed)).text for seed in range(50)}


def test_the_longest_copied_run_is_found():
    corpus = ["the cat sat on the mat", "a dog ran off"]
    assert longest_runs(["one cat sat on a hat", "a dog ran", "fish", "mat a dog"], corpus) == [3, 3, 0, 2]


GOOD = """Once upon a time, there was a girl named Mia. She lived by the sea.

One day, Mia found a kite. Tom, a boy from the village, wanted to play. Mia gave Tom the kite.
"It is yours," she said.

Tom gave the kite to Mia. Mia kept the kite. She was happy that friends are kind."""


def test_the_second_reading_finds_no_fault_in_a_good_story():
    reading = second_reading.read(GOOD)
    assert not reading.faults
    assert reading.holders == {"kite": "Mia"}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("pronoun", "She lived", "He lived"),
        ("holder", "Mia kept the kite", "Tom kept the kite"),
        ("holder", "Tom gave the kite to Mia", "Mia gave the kite to Tom"),
        ("tense", "Mia found", "Mia finds"),
        ("tense", "She was happy", "She is happy"),
        ("repeated", "Mia kept the kite.", "Mia kept the kite. She lived by the sea."),
        ("repeated", "wanted to play", "wanted to to play"),
        ("speech", 'yours," she', "yours, she"),
    ],
)
def test_the_second_reading_finds_each_fault(kind, old, new):
    assert old in GOOD
    assert second_reading.read(GOOD.replace(old, new)).has(kind)


def test_the_second_reading_agrees_with_the_generator():
    rng = random.Random(3)
    readings = [second_reading.read(tell(rng).text) for _ in range(150)]
    assert judge.share(not r.faults for r in readings) > 0.97

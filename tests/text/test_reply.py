"""The rendered prompt and the tags separate reasoning from answer, wherever the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec.chat import chat, split_reasoning
from refengine.spec.tools import write_call
from refengine.text.reply import Reply
from tests.support.tries import tries

CALL = write_call({"name": "f", "arguments": {"a": "1 </tool_call> <think>"}})
OPEN = "<tool_call>\n<function=x>"
PARTS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>"),
    *(
        "<parameter=a>",
        "</parameter>",
        "<TOOLCALL>",
        "</TOOLCALL>",
        "[",
        "]",
        "{",
        "<",
        ">",
        "th",
        "\n",
        " ",
        "a",
    ),
    *(CALL, '<TOOLCALL>[{"name": "f"}]</TOOLCALL>'),
)
texts = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


@tries(500, 83)
@given(texts, st.booleans(), st.lists(st.integers(0, 200), max_size=8))
def test_a_reply_cut_anywhere_reads_as_the_whole(text, inside, cuts):
    reply, got = Reply(inside), {"thinking": "", "answer": ""}
    cuts = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [p for a, b in pairwise(cuts) for p in reply.push(text[a:b])] + reply.flush()
    for part, piece in pieces:
        got[part] += piece
    assert (got["thinking"], got["answer"]) == split_reasoning(text, inside)


@tries(300, 50)
@given(
    st.lists(st.sampled_from(("<think>", "</think>", "<tool_call>", "\n", " a", "b ")), max_size=12).map(
        "".join
    ),
    st.booleans(),
)
def test_no_tag_is_left_and_the_answer_survives_into_the_next_prompt(text, inside):
    thinking, answer = split_reasoning(text, inside)
    assert not any(tag in part for tag in ("<think>", "</think>") for part in (thinking, answer))
    said = {"role": "assistant", "content": answer, "reasoning_content": thinking}
    prompt = chat([{"role": "user", "content": "Hi"}, said, {"role": "user", "content": "Go on"}])
    assert answer in prompt and prompt.count("<think>") == 2


@tries(300, 50)
@given(st.lists(st.sampled_from(PARTS), max_size=10).map("".join))
def test_what_a_thought_mentions_never_swallows_the_answer(thought):
    """All text after </think> is the answer, unless a whole call ended the reasoning before."""
    _, answer = split_reasoning(f"{thought}</think>\nThe answer.")
    assert answer.endswith("The answer.")
    if not any(call in thought for call in ("</function>", "</tool_call>", "]", "}", "</think>")):
        assert answer == "The answer."


@pytest.mark.parametrize(
    "text, inside, thinking, answer",
    [
        ("Hm.\n</think>\nYes.", True, "Hm.", "Yes."),
        ("<think>\nHm.\n</think>\nYes.", True, "Hm.", "Yes."),  # the model opens it once more
        ("<think>\nHm.\n</think>\nYes.", False, "Hm.", "Yes."),
        ("<think></think>Yes.", False, "", "Yes."),
        ("Yes.", False, "", "Yes."),
        ("Yes.</think> Yes.", False, "", "Yes.\n Yes."),
        ("One <think>two</think> three", False, "two", "One \n three"),
        (
            "What does <tool_call> mean?\n</think>\nIt opens a call.",
            True,
            "What does <tool_call> mean?",
            "It opens a call.",
        ),
        (f"Hm.\n{CALL}", True, "Hm.", CALL.strip()),
        ("I write <tool_call>\n<function=x> then.\n</think>\nNo.", True, f"I write {OPEN} then.", "No."),
        (f"It is {OPEN}\n<parameter=a>\n1\n</think>\nNo.", True, f"It is {OPEN}\n<parameter=a>\n1", "No."),
        (f"It is {OPEN}\n</think>\nYes.\n{CALL}", True, f"It is {OPEN}", f"Yes.\n{CALL.strip()}"),
        (f"Not {OPEN} but\n{CALL}</think>\nDone.", True, f"Not {OPEN} but", CALL + "Done."),
        ("As <TOOLCALL>[...]</TOOLCALL>.\n</think>\nNo.", True, "As <TOOLCALL>[...]</TOOLCALL>.", "No."),
        ("As <TOOLCALL>[1]</TOOLCALL>.\n</think>\nNo.", True, "As <TOOLCALL>[1]</TOOLCALL>.", "No."),
        (f"{OPEN} <think>more</think>No.", True, f"{OPEN} \nmore", "No."),
        (f"Hm.\n{OPEN}\n<parameter=a>\n1", True, "Hm.", f"{OPEN}\n<parameter=a>\n1"),  # cut off
        (f"Hm.\n{CALL}</think>\nDone.", True, "Hm.", CALL + "Done."),
    ],
)
def test_thoughts_begin_and_end_with_their_tags(text, inside, thinking, answer):
    assert split_reasoning(text, inside) == (thinking, answer)


def test_a_reply_becomes_a_message():
    reply = Reply(True)
    for char in "Hm.\n</think>\nI look.\n" + CALL:
        reply.push(char)
    reply.flush()
    call = {"name": "f", "arguments": {"a": "1 </tool_call> <think>"}}
    message = {"role": "assistant", "content": "I look.", "reasoning_content": "Hm."}
    assert reply.message([{"name": "f"}]) == message | {
        "tool_calls": [{"type": "function", "function": call}]
    }
    assert reply.message() == message | {"content": "I look.\n" + CALL.strip()}

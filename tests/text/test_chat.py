"""A conversation becomes the prompt of the model's training, and a reply becomes a message again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec.chat import chat
from refengine.spec.config import InputError
from refengine.spec.tools import write_call
from refengine.text.chat_template import ChatTemplate, read_calls, split_reasoning
from tests.support.tries import tries
from tests.support.vocabularies import TINY, engine_of

TEMPLATE = ChatTemplate.load(TINY)
FIELDS = {
    "place": {"type": "string", "description": "A town", "enum": ["Kyiv", "Zürich"]},
    "days": {"minimum": 1, "type": "integer"},
    "where": {"type": ["array", "null"]},
    "wet": {"type": "boolean"},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": " Tell the weather. ",
        "parameters": {"type": "object", "required": ["place"], "properties": FIELDS},
    },
}
words = st.text("ab<>é \n", max_size=8)
plain = words | st.integers(-9, 9) | st.booleans() | st.none()
arguments = st.dictionaries(st.sampled_from(sorted(FIELDS)), plain | st.lists(plain, max_size=2))
calls = arguments.map(lambda some: {"type": "function", "function": {"name": "weather", "arguments": some}})
contents = words | st.none() | st.lists(words.map(lambda text: {"type": "text", "text": text}), max_size=2)
replies = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": words | words.map("<think>{0}</think>{0}".format)},
    optional={"reasoning_content": words, "tool_calls": st.lists(calls, max_size=2)},
)
others = st.fixed_dictionaries({"role": st.sampled_from(("user", "tool", "system")), "content": contents})
conversations = st.lists(replies | others, min_size=1, max_size=6)
switches = st.fixed_dictionaries(
    {},
    optional={
        "enable_thinking": st.booleans(),
        "truncate_history_thinking": st.booleans(),
        "add_generation_prompt": st.booleans(),
        "tools": st.sampled_from(([], [WEATHER], [WEATHER["function"], WEATHER])),
    },
)


@tries(300, 50)
@given(messages=conversations, how=switches)
def test_the_template_of_the_embedded_model_means_what_the_spec_says(messages, how):
    assert TEMPLATE.render(messages, **how) == chat(messages, **how) == ChatTemplate().render(messages, **how)


@pytest.mark.slow
def test_the_prompt_has_the_published_ids():
    question = [{"role": "user", "content": "What is 2+2?"}]
    ids = [10, 25708, 1010, 11, 1010, 10, 3263, 1010, 7493, 1395, 1032, 1050, 1043, 1050, 1063, 11, 1010]
    for render in TEMPLATE.render, chat:
        assert engine_of("real").encode(render(question)) == [*ids, 10, 1503, 19464, 1010, 12, 1010]
        at_once = engine_of("real").encode(render(question, enable_thinking=False))
        assert at_once == [*ids, 10, 1503, 19464, 1010, 12, 13]


def test_thinking_is_shown_back_to_the_users_last_message_and_no_further():
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "reasoning_content": "old"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning_content": "new"},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    text = chat(turns, add_generation_prompt=False)
    assert text == (
        "<|im_start|>system\n<|im_end|>\n"
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n<think></think>one<|im_end|>\n"
        "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n<think>\nnew\n</think>\ntwo<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n"
        "<tool_response>\n4\n</tool_response>\n<|im_end|>\n"
    )
    assert "<think>\nold\n</think>\none" in chat(turns, truncate_history_thinking=False)


def test_tools_are_described_after_the_system_text():
    text = chat([{"role": "system", "content": "Be kind."}], tools=[WEATHER])
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools\n\n")
    assert (
        "<tools>\n<function>\n<name>weather</name>\n<description>Tell the weather.</description>\n"
        "<parameters>\n"
        "<parameter>\n<name>place</name>\n<type>string</type>\n<description>A town</description>\n"
        '<enum>["Kyiv", "Zürich"]</enum>\n</parameter>\n'
        "<parameter>\n<name>days</name>\n<type>integer</type>\n<minimum>1</minimum>\n</parameter>\n"
    ) in text
    assert '<required>["place"]</required>\n</parameters>\n</function>\n</tools>\n' in text


@pytest.mark.parametrize(
    "text, inside, parts",
    [
        ("\nSo.\n</think>\n\nYes.", True, ("So.", "Yes.")),
        ("Yes.", False, ("", "Yes.")),
        ("So", True, ("So", "")),
        ("Hm\n<tool_call>\n<function=f>", True, ("Hm", "<tool_call>\n<function=f>")),
        ("a</think>b</think>c", True, ("a", "b\nc")),
        ("", True, ("", "")),
    ],
)
def test_a_reply_is_thinking_up_to_where_it_is_closed(text, inside, parts):
    assert split_reasoning(text, inside) == parts


@given(
    some=st.fixed_dictionaries(
        {},
        optional={
            "place": st.text("ab\n{}1", max_size=9),
            "days": st.integers(),
            "wet": st.booleans(),
            "where": st.none() | st.lists(st.integers() | st.text("ab", max_size=3), max_size=3),
        },
    ),
    number=st.integers(0, 3),
)
def test_a_call_that_was_written_is_read_back_with_its_types(some, number):
    call = {"name": "weather", "arguments": some}
    assert read_calls("Let me see.\n" + number * write_call(call), [WEATHER]) == number * [call]


@pytest.mark.parametrize(
    "text",
    [
        "<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>",
        "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n</function>",
        "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=days>\n3",
    ],
)
def test_a_call_is_read_though_its_tags_are_incomplete(text):
    assert read_calls(text, [WEATHER]) == [{"name": "weather", "arguments": {"days": 3}}]


def test_values_that_are_not_of_their_type_and_undeclared_ones_stay_text():
    text = write_call({"name": "weather", "arguments": {"days": "soon", "depth": "3", "where": "[" * 10**5}})
    assert read_calls(text, [WEATHER])[0]["arguments"] == {"days": "soon", "depth": "3", "where": "[" * 10**5}


@pytest.mark.parametrize(
    "messages, says",
    [
        ([{"content": "Hi"}], "a message needs a role"),
        (["Hi"], "a message needs a role"),
        ([{"role": "user", "content": object()}], "plain data"),
    ],
)
def test_messages_of_another_form_are_refused(messages, says):
    for template in TEMPLATE, ChatTemplate():
        with pytest.raises(InputError, match=says):
            template.render(messages)


def test_the_template_is_found_wherever_a_checkpoint_has_it(tmp_path):
    def template(**settings):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return ChatTemplate.load(tmp_path)

    hi, tools = [{"role": "user", "content": "Hi"}], [WEATHER]
    assert ChatTemplate.load(tmp_path).render(hi) == template().render(hi) == chat(hi)
    assert template(chat_template="one", bos_token="<s>").render(hi) == "one"
    named = [{"name": "tool_use", "template": "{{ bos_token }}two"}, {"name": "default", "template": "one"}]
    both = template(chat_template=named, bos_token={"content": "<s>"})
    assert (both.render(hi), both.render(hi, tools=tools)) == ("one", "<s>two")
    named = [{"name": ["default"], "template": "x"}], [{"template": "x"}], [{"name": "default"}]
    for wrong in ([1], *named, "\ud800", {"\ud800": "x"}):
        with pytest.raises(InputError, match="chat_template has to be a text or a list of named texts"):
            template(chat_template=wrong)
    (tmp_path / "chat_template.jinja").write_text("three")
    assert template(chat_template="one").render(hi) == "three"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8"):
        ChatTemplate.load(tmp_path)

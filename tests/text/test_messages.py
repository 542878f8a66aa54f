"""All forms of messages that clients send give the same prompt; an unreadable one is one sentence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec.config import InputError
from refengine.text.chat_template import ChatTemplate
from refengine.text.messages import conversation_text, normalised, read_conversation, tools_of
from refengine.text.reply import Reply
from tests.support.vocabularies import TINY

TEMPLATE = ChatTemplate.load(TINY)
ASK = {"role": "user", "content": "Weather?"}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}


def history(**said) -> list[dict]:
    return [ASK, {"role": "assistant", "content": None, **said}, {"role": "tool", "content": "20"}]


def test_calls_of_every_form_are_one_prompt():
    forms = (
        {"tool_calls": [{"id": "1", "type": "function", "function": CALL}]},
        {"tool_calls": [{"function": CALL | {"arguments": '{"city": "Paris"}'}}]},
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL | {"arguments": ' {"city":"Paris"} '}]},
        {"function_call": CALL | {"arguments": '{"city": "Paris"}'}},
    )
    for template in (TEMPLATE, ChatTemplate()):
        prompts = {template.render(history(**form)) for form in forms}
        assert len(prompts) == 1 and "<parameter=city>\nParis\n</parameter>" in prompts.pop()


@pytest.mark.parametrize("arguments", ["", " ", None, {}, "{}", "null"])
def test_a_call_without_arguments_has_none(arguments):
    call = normalised(history(tool_calls=[{"function": {"name": "f", "arguments": arguments}}]))[1][
        "tool_calls"
    ][0]
    assert call["function"] == {"name": "f", "arguments": {}}


def test_a_thought_has_several_names():
    for name in ("reasoning", "reasoning_content", "thinking"):
        said = {"role": "assistant", "content": "Hello", name: "The user greets.", "reason": "eos"}
        assert normalised([said])[0]["reasoning_content"] == "The user greets."
    parts = [{"type": "thinking", "thinking": "The user greets."}, {"type": "text", "text": "Hello"}]
    assert normalised([{"role": "assistant", "content": parts}])[0] == {
        "role": "assistant",
        "content": "Hello",
        "reasoning_content": "The user greets.",
    }


def test_content_in_parts_is_their_text():
    printed = ChatTemplate({"default": "{% for m in messages %}{{ m.content | string }}{% endfor %}"})
    for content in (["Hel", "lo"], [{"type": "text", "text": "Hel"}, {"type": "input_text", "text": "lo"}]):
        assert printed.render([{"role": "user", "content": content}]) == "Hello"


@pytest.mark.parametrize(
    "message, says",
    [
        ({"role": "user"}, "a message of the role user has no content"),
        ({"role": "assistant"}, "a message of the role assistant has no content"),
        ({"role": "user", "content": 5}, "has to be text or a list of parts, not 5"),
        ({"role": "user", "content": {"a": 1}}, "has to be text or a list of parts"),
        (
            {"role": "robot", "content": "x"},
            "the role 'robot' of a message is not one of system, developer, user",
        ),
        ({"role": "user", "content": [{"type": "image_url"}]}, "is 'image_url': this model reads text only"),
        ({"role": "user", "content": [5]}, "is 5: this model reads text only"),
        (
            {"role": "assistant", "content": "", "reasoning": 5},
            "reasoning of a message has to be text, not 5",
        ),
        ({"role": "assistant", "tool_calls": 5}, "tool_calls has to be a list of calls, not 5"),
        ({"role": "assistant", "tool_calls": [5]}, "needs the name of a function: 5"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "needs the name of a function"),
        (
            {"role": "assistant", "tool_calls": [CALL | {"arguments": "{"}]},
            "the text of the arguments of 'weather' is not valid JSON",
        ),
        ({"role": "assistant", "tool_calls": [CALL | {"arguments": "[1]"}]}, r"have to be an object: \[1\]"),
    ],
)
def test_a_message_that_cannot_be_read_is_one_sentence(message, says):
    for template in (TEMPLATE, ChatTemplate()):
        with pytest.raises(InputError, match=says) as error:
            template.render([message])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "tools",
    [5, [5], [{}], [{"function": 5}], [{"name": 5}], {"tools": 5}, [{"type": "function", "function": {}}]],
)
def test_tools_without_a_name_are_one_sentence(tools):
    with pytest.raises(InputError, match="list of functions"):
        tools_of(tools)


words = st.text('ab<>é\n\u2028"', max_size=6)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "tool", "system")), "content": words},
    optional={"reasoning": words, "tool_calls": st.just([CALL])},
)


@given(st.lists(messages, max_size=4))
def test_what_is_written_is_read(some):
    some = normalised(some)
    tools = [{"name": "f"}]
    assert read_conversation(conversation_text(some), "file") == (some, [])
    assert read_conversation(conversation_text(some, tools), "file") == (some, tools)
    if some:
        lines = "\n".join(json.dumps(message) for message in some)
        assert read_conversation("\ufeff" + lines + "\n", "file") == (some, [])


@pytest.mark.parametrize(
    "text", ["", "x", "5", "[5]", '{"a": 1}', '{"role": "user"}', '{"messages": 5}', "[[]]"]
)
def test_a_file_without_messages_is_one_sentence(text):
    with pytest.raises(InputError, match="FILE") as error:
        read_conversation(text, "FILE")
    assert "\n" not in str(error.value)


def test_named_templates_are_found_and_chosen(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("tool_use", "short"):
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(name)
    tools = [{"name": "f"}]
    templates = ChatTemplate.load(tmp_path)
    assert templates.render([ASK], tools) == "tool_use"
    assert templates.named("short").render([ASK], tools) == "short"
    with pytest.raises(
        InputError, match=r"no default chat template: choose one of short, tool_use.*--template NAME"
    ):
        templates.render([ASK])
    with pytest.raises(InputError, match=r"no chat template 'long'; the checkpoint has short, tool_use"):
        templates.named("long")
    (tmp_path / "chat_template.jinja").write_text("default")
    templates = ChatTemplate.load(tmp_path)
    assert (templates.render([ASK]), templates.render([ASK], tools)) == ("default", "tool_use")
    assert templates.named(str(tmp_path / "chat_template.jinja")).render([ASK], tools) == "default"


TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n%s{% endif %}"
BY_OPTION = "{% if enable_thinking %}<think>\n{% else %}<think></think>{% endif %}"
BY_TEXT = "{% if '/no_think' in messages[-1].content %}<think></think>{% else %}<think>\n{% endif %}"
TAILS = {
    "opens": "<think>\n",
    "closes": "<think></think>",
    "ignores": "",
    "option": BY_OPTION,
    "text": BY_TEXT,
}


@given(
    st.sampled_from(sorted(TAILS)),
    st.booleans(),
    st.sampled_from(("Hi", "Hi /no_think", "What is <think>?", "</think>", "<think>")),
    st.booleans(),
    st.sampled_from(("Hello.", "It is <tool_call>.")),
)
def test_the_rendered_prompt_says_whether_a_reply_begins_inside_a_thought(
    how, thinking, asked, opens, answer
):
    """With any option, the answer is in content without tags, and it is in the next prompt."""
    template = ChatTemplate({"default": TURNS + BEGIN.replace("%s", TAILS[how])})
    messages = [{"role": "user", "content": asked}]
    prompt = template.prompt(messages, enable_thinking=thinking)
    assert prompt.inside == prompt.text.endswith("<|im_start|>assistant\n<think>\n")
    thought = "So <tool_call> it is."
    reply = Reply(prompt.inside)  # the model ends open reasoning, and may begin some itself
    written = f"{'<think>' * opens}{thought}</think>{answer}" if opens or prompt.inside else answer
    for char in written:
        reply.push(char)
    reply.flush()
    message = reply.message()
    assert message["content"] == answer
    assert message.get("reasoning_content", thought) == thought
    following = [*messages, message, {"role": "user", "content": "Go on"}]
    assert answer in template.render(following, enable_thinking=thinking)


def test_a_template_that_always_opens_a_thought_is_read_too():
    always = ChatTemplate({"default": TURNS + "<|im_start|>assistant\n<think>\n"})
    assert always.prompt([ASK]).inside and not ChatTemplate({"default": TURNS}).prompt([ASK]).inside
    prefilled = ChatTemplate({"default": TURNS + BEGIN.replace("%s", "<think>\nOkay, ")})
    assert prefilled.prompt([ASK]).inside


def test_the_form_of_calls_is_that_of_the_template():
    nano_v2 = ChatTemplate({"default": TURNS + "{# <TOOLCALL>[...]</TOOLCALL> #}"})
    assert nano_v2.prompt([ASK]).json_calls and not TEMPLATE.prompt([ASK]).json_calls
    reply = Reply(False)
    reply.push('Let me see.<TOOLCALL>[{"name": "f", "arguments": {"a": 1}}]</TOOLCALL>')
    reply.flush()
    assert reply.message([{"name": "f"}], json_calls=True) == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }

"""Only the end of a prompt decides whether a reply begins inside reasoning; tags in messages do not."""

from functools import lru_cache

from hypothesis import example, given
from hypothesis import strategies as st

import refengine
from refengine.text.chat_template import ChatTemplate

PIECES = st.lists(
    st.sampled_from(("<think>", "</think>", "\n", "word", "<|im_start|>assistant\n", " ")), max_size=5
)
TEXTS = PIECES.map("".join).map(lambda text: text or "word")


@lru_cache
def templates() -> list[ChatTemplate]:
    """Return the template of the embedded model, and the book's, for checkpoints without a template."""
    with refengine.load("tiny") as engine:
        own = engine.chat_template
    return [own, ChatTemplate({})]


# Of a model that does not think: the prompt ends before the reply's first word.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@given(texts=st.lists(TEXTS, min_size=1, max_size=3), system=TEXTS, thinking=st.booleans())
@example(texts=["what does <think> mean?"], system="be brief", thinking=False)
@example(texts=["an end: </think>"], system="<think>", thinking=True)
def test_a_reply_begins_inside_a_thought_where_the_prompt_ends_in_one(texts, system, thinking):
    messages = [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
        messages.append({"role": "user", "content": text})
        if i < len(texts) - 1:
            messages.append({"role": "assistant", "content": "so be it"})
    for template in templates():
        assert template.prompt(messages, enable_thinking=thinking).inside == thinking
    assert not ChatTemplate({"default": PLAIN}).prompt(messages).inside

"""The commands of a conversation, in any order, have the effects that /help describes."""

import json
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refengine import InputError
from refengine.cli.chat import Talk, there

LINES = st.sampled_from(
    ("hello", "  again ", " /new is text here", "/new", "/clear", "/system be brief", "/system", "/regen",
     "/retry", "/thinking off", "/thinking on", "", "   ")
)  # fmt: skip


class Literal:
    """A conversation, and the inputs of each reply: the messages before it, its seed, its thinking."""

    def __init__(self, seed):
        self.history, self.seed, self.thinking, self.asked = [], seed, True, []

    def answer(self):
        self.asked.append(([(m["role"], m["content"]) for m in self.history], self.seed, self.thinking))
        self.history = [*self.history, {"role": "assistant", "content": f"reply {len(self.asked)}"}]

    def line(self, line: str):
        system = [m for m in self.history if m["role"] == "system"]
        others = [m for m in self.history if m["role"] != "system"]
        if line in ("/new", "/clear"):
            self.history = system
        elif line.startswith("/system"):
            text = line.removeprefix("/system").strip()
            self.history = [{"role": "system", "content": text}] * bool(text) + others
        elif line in ("/regen", "/retry"):
            while others and others[-1]["role"] != "user":
                others.pop()
            if others:
                self.history, self.seed = system + others, None if self.seed is None else self.seed + 1
                self.answer()
        elif line.startswith("/thinking"):
            self.thinking = line.endswith("on")
        elif line.strip():
            self.history = [*self.history, {"role": "user", "content": line.strip()}]
            self.answer()


def answered(talk: Talk, asked: list):
    """Return a stand-in for `answer` that records its arguments."""

    def answer():
        messages = [(m["role"], m["content"]) for m in talk.history]
        asked.append((messages, talk.sampling.get("seed"), talk.thinking))
        talk.history = [*talk.history, {"role": "assistant", "content": f"reply {len(asked)}"}]

    return answer


def new(seed) -> Talk:
    return Talk(None, {"seed": seed, "temperature": 0.5}, True, False, False, False)


@given(lines=st.lists(LINES, max_size=9), seed=st.sampled_from((None, 0, 7)))
@example(lines=["/system be brief", "hello", "/new", "  again ", "/regen", "/regen"], seed=0)
@example(lines=["/regen", "hello", "/system", "/system be brief", "/thinking off", "/regen"], seed=7)
def test_commands_in_any_order_leave_the_conversation_that_help_describes(lines, seed):
    talk, expected, asked = new(seed), Literal(seed), []
    with mock.patch.object(talk, "answer", answered(talk, asked)):
        for line in lines:
            regenerates = line in ("/regen", "/retry") and all(m["role"] != "user" for m in talk.history)
            if regenerates:
                with pytest.raises(InputError, match="no message to answer"):
                    talk.line(line)
            else:
                talk.line(line)
            expected.line(line)
            assert talk.history == expected.history and talk.thinking == expected.thinking
    assert asked == expected.asked
    assert talk.sampling == {"seed": expected.seed, "temperature": 0.5}


def test_a_conversation_that_was_saved_goes_on_where_it_was(tmp_path, capsys):
    talk, asked = new(3), []
    with mock.patch.object(talk, "answer", answered(talk, asked)):
        for line in ("/system be brief", "hello", "/save " + str(tmp_path / "talk.json")):
            talk.line(line)
    other = new(3)
    other.line("/load " + str(tmp_path / "talk.json"))
    assert other.history == talk.history and json.loads((tmp_path / "talk.json").read_text())


@pytest.mark.parametrize("error", [InputError("full"), KeyboardInterrupt()])
def test_a_message_or_a_second_answer_that_fails_leaves_the_talk_as_it_was(error):
    talk, asked = new(3), []
    with mock.patch.object(talk, "answer", answered(talk, asked)):
        talk.line("hello")
    before = talk.history, talk.sampling
    for line in ("and more", "/regen"):
        with mock.patch.object(talk, "answer", side_effect=error), pytest.raises(type(error)):
            talk.line(line)
        assert (talk.history, talk.sampling) == before


class Engine:
    """Replies "yes" to any prompt."""

    chat_template = mock.Mock(**{"prompt.return_value": mock.Mock(text="", inside=False, json_calls=False)})
    tokenizer = mock.Mock(**{"encode.return_value": [1, 2]})

    def generate(self, ids, **how):
        yield mock.Mock(text="yes", reason="stop", statistics=None, state=None)


def test_a_reply_is_kept_where_the_file_of_the_talk_cannot_be_written(capsys):
    talk = Talk(Engine(), {"seed": 3}, True, False, as_json=True, show_thinking=False)
    with (
        mock.patch.object(Talk, "save_state", side_effect=InputError("the disk is full")),
        pytest.raises(InputError),
    ):
        talk.line("hello")
    assert [message["content"] for message in talk.history] == ["hello", "yes"]
    assert json.loads(capsys.readouterr().out)["content"] == "yes"


def test_the_file_of_a_talk_may_be_below_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not there("~/talk")
    (tmp_path / "talk").touch()
    assert there("~/talk") and not there("~/other")
    for path in ("", "~", "~/no/talk"):
        with pytest.raises(InputError, match=r"empty|is a directory|is not a directory"):
            there(path)

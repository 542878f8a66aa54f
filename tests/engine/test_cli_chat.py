"""refengine chat: a conversation in a terminal, in a pipe, and from a file."""

import contextlib
import json
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from refengine.text.messages import read_conversation
from tests.engine.test_cli import cli, fails, piped  # noqa: F401

pytestmark = pytest.mark.slow

pty = pytest.importorskip("pty", reason="there are no terminals to open")
TINY = ("-t", "0", "-n", "40")


class Terminal:
    """A command in a separate terminal."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", PYTHONUNBUFFERED="1")
            os.execv(sys.executable, [sys.executable, "-m", "refengine", *args])
        self.seen = ""

    def __del__(self):
        with contextlib.suppress(OSError):
            os.close(self.fd)
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)

    def until(self, text: str, seconds: float = 120) -> str:
        """Return the output up to `text`, and remove it from the buffer."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        found, _, self.seen = self.seen.partition(text)
        return found

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")

    def interrupt(self, at_prompt: bool = False) -> None:
        """Send Ctrl-C; at a prompt, only once the command waits for a key.

        A signal between the prompt and the wait would be noticed only with the next key.
        """
        end = time.monotonic() + 120
        while at_prompt and not self.waits() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGINT)

    def waits(self) -> bool:
        """Return whether the command sleeps until there is input."""
        try:
            where = Path(f"/proc/{self.pid}/wchan").read_text()
        except OSError:
            where = "0"
        if where == "0":  # the system hides what it waits for
            time.sleep(1)
            return True
        return "poll" in where or "select" in where or "tty" in where

    def code(self, seconds: float = 120) -> int:
        """Return the exit code."""
        end = time.monotonic() + seconds
        while True:
            assert time.monotonic() < end, f"it does not end: {self.seen!r}"
            try:
                if select.select([self.fd], [], [], 1)[0] and not os.read(self.fd, 65536):
                    break
            except OSError:  # the terminal is closed
                break
        pid, self.pid = self.pid, None
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_conversation_in_a_terminal(tmp_path):
    talk = Terminal("chat", *TINY)
    assert "tells short stories" in talk.until("> ")
    talk.type("Hello")
    reply = talk.until("\r\n> ")
    assert "\x1b[2m[thinking]" in reply and "[answer]" in reply and "</think>" not in reply
    talk.type("/nothing")
    assert "there is no command /nothing; /help lists them" in talk.until("> ")
    talk.type("/help")
    assert "/regen" in talk.until("\r\n> ")
    talk.type("/thinking maybe")
    assert "/thinking needs on or off" in talk.until("\r\n> ")
    talk.type("/thinking off")
    talk.until("> ")
    talk.type("/regen")
    assert "[thinking]" not in talk.until("\r\n> ")
    talk.type("/stats")
    assert "tokens/s" in talk.until("\r\n> ")
    talk.type("/system Be brief.")
    talk.until("\r\n> ")
    talk.type(f"/save {tmp_path / 'talk.json'}")
    talk.until("\r\n> ")
    talk.type("one\\")
    talk.until("... ")
    talk.type("two")
    talk.until("\r\n> ")
    talk.type('"""three')
    talk.until("... ")
    talk.type('four"""')
    talk.until("\r\n> ")
    talk.type(f"/save {tmp_path / 'more.json'}")
    talk.until("\r\n> ")
    talk.type("/new")
    talk.until("> ")
    talk.type("/regen")
    assert "no message to answer again" in talk.until("\r\n> ")
    talk.type(f"/load {tmp_path / 'talk.json'}")
    assert "(3 messages)" in talk.until("\r\n> ")
    talk.type("/exit")
    assert talk.code() == 0
    saved, _ = read_conversation((tmp_path / "talk.json").read_text(), "talk")
    assert [m["role"] for m in saved] == ["system", "user", "assistant"] and saved[0][
        "content"
    ] == "Be brief."
    more, _ = read_conversation((tmp_path / "more.json").read_text(), "more")
    assert more[: len(saved)] == saved and [m["content"] for m in more[3::2]] == ["one\ntwo", "three\nfour"]


def test_ctrl_c_stops_a_reply_and_keeps_the_talk_and_twice_it_leaves(tmp_path):
    talk = Terminal("chat", "-t", "0", "-n", "100000", "--ignore-eos", "--thinking", "off")
    talk.until("> ")
    talk.type("Tell me a story.")
    talk.until("story.\r\n")
    while len(talk.seen.strip()) < 20:  # the reply has begun
        talk.seen += os.read(talk.fd, 65536).decode(errors="replace")
    talk.interrupt()
    talk.until("(Ctrl-C again, or /exit, leaves)")
    talk.until("> ")
    talk.type(f"/save {tmp_path / 'talk.json'}")
    talk.until("\r\n> ")
    talk.interrupt(at_prompt=True)
    talk.until("(Ctrl-C again, or /exit, leaves)")
    talk.until("> ")
    talk.interrupt(at_prompt=True)
    assert talk.code() == 130
    messages, _ = read_conversation((tmp_path / "talk.json").read_text(), "talk")
    assert [m["role"] for m in messages] == ["user", "assistant"] and messages[1]["content"]


def test_only_ctrl_c_after_ctrl_c_leaves():
    """A line between the two starts the count anew, also a line of a longer text."""
    talk = Terminal("chat", *TINY)
    talk.until("> ")
    for _ in range(2):
        talk.type('"""')
        talk.until("... ")
        talk.interrupt(at_prompt=True)
        talk.until("(Ctrl-C again, or /exit, leaves)")
        talk.until("> ")
    talk.type("/exit")
    assert talk.code() == 0


def test_thoughts_are_left_out_of_a_pipe_unless_asked_for(cli):  # noqa: F811
    _, out, _ = cli("chat", "Hi", *TINY)
    assert out.strip() and "[" not in out
    assert cli("chat", "-p", "Hi", *TINY)[1] == out
    _, shown, _ = cli("chat", "Hi", *TINY, "--show-thinking")
    assert re.fullmatch(r"\[thinking\]\n.+\n\[answer\]\n" + re.escape(out), shown, re.DOTALL)


def test_both_ways_to_switch_thinking_off_are_one(cli):  # noqa: F811
    off = [
        json.loads(cli("chat", "Hi", *TINY, "--json", *how)[1])
        for how in (["--thinking", "off"], ["--no-thinking"])
    ]
    assert off[0]["content"] == off[1]["content"] and off[0]["reasoning"] == ""
    assert json.loads(cli("chat", "Hi", *TINY, "--json", "--thinking", "on")[1])["reasoning"]
    assert "not on or off" in fails(cli("chat", "Hi", "--thinking", "some"), code=2)


def test_a_conversation_is_read_and_what_is_printed_is_read_back(cli, tmp_path):  # noqa: F811
    ask = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    (tmp_path / "talk.json").write_text(json.dumps(ask))
    code, out, _ = cli("chat", "--messages", tmp_path / "talk.json", "--json", *TINY)
    assert code == 0 and json.loads(out)["reasoning"]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, ask)) + "\n" + out)
    code, again, _ = cli("chat", "Go on", "--messages", tmp_path / "talk.jsonl", "--json", *TINY)
    assert (
        code == 0
        and json.loads(again)["statistics"]["prompt_tokens"] > json.loads(out)["statistics"]["prompt_tokens"]
    )
    assert piped(["chat", "--messages", "-", *TINY], json.dumps(ask).encode())[0] == 0


@pytest.mark.parametrize(
    "text, says",
    [
        ('[{"role": "user"}]', "has no content"),
        ('[{"role": "user", "content": 5}]', "not 5"),
        ('[{"role": "robot", "content": "x"}]', "the role 'robot'"),
        ("", "not valid JSON"),
        ("5", "is not a list of messages"),
    ],
)
def test_a_file_of_messages_that_cannot_be_read_is_one_sentence(cli, tmp_path, text, says):  # noqa: F811
    (tmp_path / "talk.json").write_text(text)
    assert says in fails(cli("chat", "--messages", tmp_path / "talk.json"))


def test_commands_in_a_pipe(cli):  # noqa: F811
    code, out, err = piped(["chat", *TINY, "--thinking", "off"], b"Hi\n/new\n\nHi\n/exit\nHi\n")
    assert code == 0 and len(out.splitlines()) == 2 and err == ""
    code, _, err = piped(["chat", *TINY], b"/nothing\n")
    assert code == 1 and "there is no command /nothing" in err


TURN = "{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
HEAD = "{%- for m in messages -%}" + TURN + "{%- endfor -%}"
REPLY = "{%%- if add_generation_prompt -%%}{{ '<|im_start|>assistant\\n%s' }}{%%- endif -%%}"


@pytest.mark.parametrize("tail, thinks", [("<think></think>", False), ("", None), ("<think>\\n", True)])
def test_the_rendered_prompt_decides_whether_a_reply_thinks(cli, tmp_path, tail, thinks):  # noqa: F811
    (tmp_path / "own.jinja").write_text(HEAD + REPLY % tail)
    for option in ("on", "off"):
        args = ("--template", tmp_path / "own.jinja", "--thinking", option, "--json", "-t", "0")
        reply = json.loads(cli("chat", "Tell me a story about a cat.", *args)[1])
        assert reply["content"] and not any(tag in str(reply) for tag in ("<think>", "</think>"))
        assert thinks is None or bool(reply["reasoning"]) == thinks


def test_tools_and_templates_that_are_not_there_are_one_sentence(cli, tmp_path):  # noqa: F811
    (tmp_path / "tools.json").write_text('[{"name": 5}]')
    assert "have to be a list of functions" in fails(cli("chat", "Hi", "--tools", tmp_path / "tools.json"))
    assert "no chat template 'short'; the checkpoint has default" in fails(
        cli("chat", "Hi", "--template", "short")
    )
    (tmp_path / "tools.json").write_text('[{"name": "weather", "parameters": {}}]')
    code, out, _ = cli("chat", "Hi", "--tools", tmp_path / "tools.json", "--json", "-n", "3")
    assert code == 0 and json.loads(out)["statistics"]["prompt_tokens"] > 100


def test_quoted_lines_are_never_a_command():
    from refengine.cli.chat import turns

    quoted = list(turns(iter(['"""', "/etc/x is a path", '"""', "/help", '"""/new"""'])))
    assert [turn.startswith("/") for turn in quoted] == [False, True, False]

"""Whatever is handed in: one sentence on stderr, exit code 1 (2 where the command is wrong), no traceback."""

import pytest

from refengine.cli.chat import ALONE, COMMANDS, Talk
from refengine.spec.config import InputError
from tests.engine.test_cli import cli, fails, piped  # noqa: F401

# Variables with a value that their option does not take; the command that reads it.
VARIABLES = {
    "REFENGINE_BATCH": ("1,4", "generate", "--batch): '1,4' is not a whole number"),
    "REFENGINE_MAX_TOKENS": ("many", "generate", "--max-tokens): 'many' is not a whole number"),
    "REFENGINE_TEMPERATURE": ("hot", "generate", "--temperature): 'hot' is not a number"),
    "REFENGINE_TOP_K": ("-1", "generate", "--top-k): -1 is not in the range x>=0"),
    "REFENGINE_TOP_P": ("7", "generate", "--top-p): 7.0 is not in the range 0<x<=1"),
    "REFENGINE_MIN_P": ("nan", "generate", "--min-p): nan is not"),
    "REFENGINE_REPETITION_PENALTY": ("0", "generate", "--repetition-penalty): 0.0 is not in the range"),
    "REFENGINE_SEED": ("1.5", "generate", "--seed): '1.5' is not a whole number"),
    "REFENGINE_LOGPROBS": ("some", "generate", "--logprobs): 'some' is not a whole number"),
    "REFENGINE_IGNORE_EOS": ("perhaps", "generate", "--ignore-eos): 'perhaps' is not a valid boolean"),
    "REFENGINE_JSON": ("perhaps", "generate", "--json): 'perhaps' is not a valid boolean"),
    "REFENGINE_STATS": ("perhaps", "generate", "--stats): 'perhaps' is not a valid boolean"),
    "REFENGINE_ECHO": ("perhaps", "generate", "--echo): 'perhaps' is not a valid boolean"),
    "REFENGINE_QUIET": ("perhaps", "inspect", "--quiet): 'perhaps' is not a valid boolean"),
    "REFENGINE_VERBOSE": ("perhaps", "generate", "--verbose): 'perhaps' is not a valid boolean"),
    "REFENGINE_DEBUG": ("perhaps", "generate", "--debug): 'perhaps' is not a valid boolean"),
    "REFENGINE_DETERMINISTIC": ("perhaps", "generate", "--deterministic): 'perhaps' is not a valid"),
    "REFENGINE_BACKEND": ("abacus", "generate", "--backend): 'abacus' is not one of"),
    "REFENGINE_DTYPE": ("int8", "generate", "--dtype): 'int8' is not one of"),
    "REFENGINE_THREADS": ("two", "generate", "--threads): 'two' is not a whole number"),
    "REFENGINE_TP": ("0", "generate", "--tp): 0 is not in the range x>=1"),
    "REFENGINE_EP": ("x", "generate", "--ep): 'x' is not a whole number"),
    "REFENGINE_PP": ("x", "generate", "--pp): 'x' is not a whole number"),
    "REFENGINE_TIMEOUT": ("soon", "generate", "--timeout): 'soon' is not a number"),
    "REFENGINE_PATIENCE": ("soon", "generate", "--timeout): 'soon' is not a number"),
    "REFENGINE_THINKING": ("much", "chat", "--thinking): 'much' is not on or off"),
    "REFENGINE_NO_THINKING": ("much", "chat", "--no-thinking): 'much' is not a valid boolean"),
    "REFENGINE_SHOW_THINKING": ("much", "chat", "--show-thinking): 'much' is not a valid boolean"),
    "REFENGINE_TOKENS": ("x", "score", "--tokens): 'x' is not a valid boolean"),
    "REFENGINE_COUNT": ("x", "tokenize", "--count): 'x' is not a valid boolean"),
    "REFENGINE_PROMPT_TOKENS": ("a,b", "bench", "--prompt-tokens): 'a,b' is not a list of whole numbers"),
    "REFENGINE_CONTEXT": ("0", "bench", "--context): every number must be at least 1"),
    "REFENGINE_REPEAT": ("0", "bench", "--repeat): 0 is not in the range x>=1"),
    "REFENGINE_STEPS": ("x", "bench", "--steps): 'x' is not a whole number"),
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_with_a_wrong_value_is_named(cli, monkeypatch, variable):  # noqa: F811
    value, command, says = VARIABLES[variable]
    monkeypatch.setenv(variable, value)
    arguments = [] if command in ("bench", "inspect") else ["x"]
    err = fails(cli(command, *arguments), code=2)
    assert f"Error: Invalid value of {variable} (for {says}" in err.splitlines()[-1]


def test_a_value_that_is_typed_names_no_variable(cli, monkeypatch):  # noqa: F811
    monkeypatch.setenv("REFENGINE_BATCH", "1,4")
    err = fails(cli("generate", "x", "--batch", "y"), code=2)
    assert "REFENGINE_BATCH" not in err and "'y' is not a whole number" in err
    assert cli("generate", "x", "--batch", "1", "-n", "1")[0] == 0
    assert "1,4" not in fails(cli("bench", "--context", "0"), code=2), "bench takes a list"


def talk():
    return Talk(None, {}, True, False, False, None)


@pytest.mark.parametrize("name", ALONE)
def test_a_command_that_takes_nothing_refuses_what_follows_it(name):
    with pytest.raises(InputError, match=f"^{name.replace('?', '[?]')} takes nothing after it, not 'now'"):
        talk().line(f"{name} now")


@pytest.mark.parametrize(
    "line, says",
    [
        ("/nothing", "there is no command /nothing"),
        ("/NEW", "there is no command /NEW"),
        ("/", "there is no command /;"),
        ("/thinking", "/thinking needs on or off"),
        ("/thinking on off", "/thinking needs on or off"),
        ("/save", "/save needs the name of a file"),
        ("/load", "/load needs the name of a file"),
        ("/load /no/where", "/no/where cannot be read: No such file"),
        ("/load ~nobody-here/x", "~nobody-here/x: there is no such home directory"),
        ("/save ~nobody-here/x", "~nobody-here/x: there is no such home directory"),
        ("/save /no/where", "/no/where cannot be written: No such file"),
        ("/save .", ". cannot be written: Is a directory"),
        ("/load .", ". cannot be read: Is a directory"),
        ("/load a\0b", "cannot be read: embedded null"),
        ("/save a\0b", "cannot be written: embedded null"),
        ("/regen", "there is no message to answer again"),
    ],
)
def test_a_command_of_a_conversation_that_cannot_be_done_is_one_sentence(line, says):
    with pytest.raises(InputError) as error:
        talk().line(line)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_every_command_that_help_lists_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS.splitlines():
        if line.startswith("/"):
            name = line.split()[0]
            try:
                talk().line(f"{name} extra")
            except InputError as error:
                assert "there is no command" not in str(error)

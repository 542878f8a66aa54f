"""Any bad input gives one sentence on stderr, exit code 1 (2 for a wrong command), and no traceback."""

import json
import os
import shutil

import pytest

from refengine.cli.chat import ALONE, COMMANDS, Talk
from refengine.spec.config import InputError
from tests.engine.test_cli import cli, fails, piped  # noqa: F401
from tests.support.checkpoints import alter, alter_json
from tests.support.vocabularies import TINY

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


@pytest.mark.parametrize(
    "variable, value, command",
    [
        ("REFENGINE_MODEL", "nowhere", ["generate", "x"]),
        ("REFENGINE_MODEL", "nvidia/no-such", ["inspect"]),
        ("REFENGINE_DEVICE", "cuda:77", ["generate", "x", "--backend", "numpy"]),
        ("REFENGINE_FILE", "missing-file", ["generate"]),
        ("REFENGINE_PROMPTS", "missing-file", ["generate"]),
        ("REFENGINE_IDS", "5;6", ["tokenize"]),
        ("REFENGINE_TEMPLATE", "no-such", ["chat", "x"]),
        ("REFENGINE_TOOLS", "missing-file", ["chat", "x"]),
        ("REFENGINE_MESSAGES", "missing-file", ["chat", "x"]),
    ],
)
def test_a_value_that_is_wrong_later_names_its_variable_too(cli, monkeypatch, variable, value, command):  # noqa: F811
    assert variable not in fails(cli(*command, f"--{variable[10:].lower()}", value)), "where it is typed"
    monkeypatch.setenv(variable, value)
    assert fails(cli(*command)).endswith(f" (the value of {variable})\n")


def talk():
    return Talk(None, {}, True, False, False, None)


@pytest.mark.parametrize("name", ALONE)
def test_a_command_that_takes_nothing_refuses_what_follows_it(name):
    with pytest.raises(
        InputError, match=f"^{name.replace('?', '[?]')} takes no argument, but was given 'now'"
    ):
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


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Return a directory of unusable files, and make it the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    texts = {
        "blank": "\n \n",
        "empty": "",
        "one": "x",
        "broken.json": "{",
        "robot.json": '[{"role": "robot", "content": "Hi"}]',
        "image.json": '[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]',
        "call.json": '[{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]',
        "reply.json": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]',
        "tools.json": '[{"type": "function"}]',
        "syntax.jinja": "{% if %}",
        "endless.jinja": "{% for i in range(999999999) %}{% endfor %}x",
        "raises.jinja": "{{ raise_exception('roles must alternate') }}",
        "model.gguf": "GGUF",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    return tmp_path


@pytest.fixture
def model(files):
    """Return a function that copies the embedded model and changes its config.json."""

    def copy(**keys):
        shutil.copytree(TINY, files / "m", ignore=shutil.ignore_patterns("*.md", "training.json"))
        alter_json(files / "m" / "config.json", **keys)
        return files / "m"

    return copy


# Command, exit code, a part of the sentence.
INPUTS = [
    ("generate -f missing", 1, "missing cannot be read: No such file or directory"),
    ("generate -f nothing", 1, "nothing cannot be read: Is a directory"),
    ("generate -f latin", 1, "latin is not UTF-8 text (byte 3)"),
    ("generate -f empty", 1, "the prompt is empty"),
    ("generate --prompts blank", 1, "blank holds no prompt"),
    ("generate --ids 1,-2", 1, "'-2' is not a token id"),
    ("generate --ids 5,99999", 1, "token id 99999 is not in the vocabulary"),
    ("generate x --backend numpy --dtype f16", 1, "computes in float32 or float64, not in float16"),
    ("generate x --backend numpy --device cuda:7", 1, "the numpy backend runs on the cpu, not on 'cuda:7'"),
    ("generate x --tp 3", 1, "mpiexec -n 3"),
    ("generate x -m missing", 1, "there is no model 'missing'"),
    ("generate x -m nvidia/no-such", 1, "'hf download nvidia/no-such'"),
    ("generate x -m nvidia/no-such@refs/pr/1", 1, "'hf download nvidia/no-such --revision refs/pr/1'"),
    ("generate x -m model.gguf", 1, "model.gguf is too short for a GGUF file"),
    ("generate x -m pickle", 1, "may be a pickle, which could run any code"),
    ("generate x -m nothing", 1, "nothing is not a model"),
    ("inspect latin", 1, "latin is not a directory"),
    ("score missing", 1, "missing cannot be read"),
    ("score empty", 1, "empty is empty"),
    ("score one", 1, "one is a single token"),
    ("tokenize -f latin", 1, "latin is not UTF-8 text"),
    ("tokenize --ids 99999", 1, "the tokenizer has no token with the id 99999"),
    ("tokenize --ids 99999999999", 1, "the tokenizer has no token with the id 99999999999"),
    ("bench --context 1000000000", 1, "1000000000 tokens are more than the model's context"),
    ("chat --messages broken.json", 1, "broken.json is not valid JSON"),
    ("chat --messages robot.json", 1, "the role 'robot' of a message is not one of"),
    ("chat --messages image.json", 1, "a part of a message is 'image_url': this model reads text only"),
    ("chat --messages call.json", 1, "a call in tool_calls needs the name of a function"),
    ("chat x --tools broken.json", 1, "broken.json is not valid JSON"),
    ("chat x --tools tools.json", 1, "have to be a list of functions"),
    ("chat x --template other", 1, "there is no chat template 'other'"),
    ("chat x --template missing.jinja", 1, "missing.jinja does not exist"),
    ("chat x --template syntax.jinja", 1, "the chat template is not Jinja in line 1"),
    ("chat x --template endless.jinja", 1, "the chat template cannot render these messages"),
    ("chat x --template raises.jinja", 1, "roles must alternate"),
    ("generate x --stop=", 2, "a stop string is empty"),
    ("generate x --top-p 7", 2, "7.0 is not in the range 0<x<=1"),
    ("generate x -f one", 2, "give only one of PROMPT, --prompt, --file, --prompts and --ids"),
    ("generate x --temprature 1", 2, "No such option '--temprature'"),
    ("generate x -ngl 9", 2, "--backend cuda"),
    ("inspect tiny -m tiny", 2, "give the model once"),
    ("chat x -p y", 2, "give only one of MESSAGE and --prompt"),
    ("chat x --thinking some", 2, "'some' is not on or off"),
    ("bench --batch 1,x", 2, "'1,x' is not a list of whole numbers"),
    ("completion ksh", 2, "'ksh' is not one of"),
    ("sing", 2, "No such command 'sing'"),
]


def one_sentence(result, code: int) -> str:
    """Return the sentence of a failed command; a usage error prints the usage before it."""
    err = fails(result, code)
    lines = err.strip().splitlines()
    if code == 2:
        assert lines[-1].startswith("Error: ") and sum(line.startswith("Error: ") for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize("words, code, says", INPUTS, ids=[words for words, _, _ in INPUTS])
def test_a_bad_input_is_one_sentence(cli, files, words, code, says):  # noqa: F811
    assert says in one_sentence(cli(*words.split(" ")), code)


def test_arguments_that_no_shell_line_shows_are_one_sentence(cli, files):  # noqa: F811
    assert "the prompt is empty" in one_sentence(cli("generate", ""), 1)
    latin = os.fsdecode(b"caf\xe9")
    assert "the prompt is not UTF-8 text" in one_sentence(cli("generate", latin), 1)
    assert "the message is not UTF-8 text" in one_sentence(cli("chat", latin), 1)
    assert "'' is not a token id" in one_sentence(cli("generate", "--ids", ""), 1)
    assert "the name of the model is empty" in one_sentence(cli("generate", "x", "-m", ""), 1)
    assert "the name of the file is empty" in one_sentence(cli("score", ""), 1)
    assert "the model's context is" in one_sentence(cli("generate", "word " * 40000), 1)


# Changes to a copy of the embedded model, and a part of the sentence.
MODELS = [
    ({"model_type": "llama"}, "model_type 'llama' is not supported"),
    ({"hidden_size": "64"}, "hidden_size = '64' is not a positive integer"),
    ({"hidden_size": None}, "config.json lacks hidden_size"),
    ({"mtp_use_rope": True}, "mtp_use_rope = True is not supported"),
    ({"hybrid_override_pattern": "MXM", "layers_block_type": None}, "has letters other than"),
    ({"n_groups": 7}, "is not a multiple of n_groups = 7"),
    ({"eos_token_id": "2"}, "eos_token_id holds '2', which is not a token id"),
    ({"n_routed_experts": 60000}, "calls for more experts than the"),
]


@pytest.mark.parametrize("keys, says", MODELS, ids=[next(iter(keys)) for keys, _ in MODELS])
def test_a_bad_configuration_is_one_sentence(cli, model, keys, says):  # noqa: F811
    assert says in one_sentence(cli("generate", "x", "-m", model(**keys)), 1)


FILES = {
    "config.json": ("[]", "config.json is not a JSON object"),
    "tokenizer.json": ("{}", "tokenizer.json is not a tokenizer that can be read"),
    "tokenizer_config.json": ("{", "tokenizer_config.json is not valid JSON"),
    "model.safetensors": ("", "model.safetensors is empty: download it again"),
    "model.safetensors.index.json": ("{}", "has no weight_map"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_model_is_one_sentence(cli, model, name):  # noqa: F811
    text, says = FILES[name]
    (model() / name).write_text(text)
    assert says in one_sentence(cli("generate", "x", "-m", "m"), 1)


def test_weights_that_are_no_numbers_are_one_sentence(cli, model):  # noqa: F811
    alter(model() / "model.safetensors", lambda header, data: (header, b"\xff" * len(data)))
    assert "damaged" in one_sentence(cli("generate", "x", "-m", "m", "--no-echo"), 1)
    assert "damaged" in one_sentence(cli("chat", "x", "-m", "m"), 1)
    assert json.loads(cli("inspect", "m", "--json")[1])["tensors"], "it can still be looked at"

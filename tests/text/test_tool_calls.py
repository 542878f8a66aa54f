"""The value of a tool argument is read back as it was written, by the whole JSON schema."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec.config import InputError
from refengine.spec.tools import accepts, as_text, read_calls, read_json_reply, read_reply, write_call
from refengine.text.messages import conversation_text, read_conversation
from refengine.text.reply import Reply
from tests.support.tries import tries

TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
TAGS = ("<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=b>", "</parameter>")
pieces = st.lists(
    st.sampled_from((*TAGS, "null", "None", "True", "5", "{", "}", " ", "\n", "é", '"')), max_size=6
)
strings = pieces.map("".join)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=2) | st.dictionaries(strings, v, max_size=2), max_leaves=4
)
simple = (
    st.sampled_from((True, None, {}, {"$ref": "#/$defs/X"}, {"$ref": "#/$defs/Loop"}, {"$ref": "#/no/where"}))
    | st.sampled_from(TYPES).map(lambda t: {"type": t})
    | st.lists(st.sampled_from(TYPES), max_size=3).map(lambda t: {"type": t})
    | st.lists(scalars, min_size=1, max_size=3).map(lambda v: {"enum": v})
    | scalars.map(lambda v: {"const": v})
)
some = ("anyOf", "oneOf", "allOf")
schemas = st.recursive(
    simple,
    lambda s: st.builds(lambda k, v: {k: v}, st.sampled_from(some), st.lists(s, min_size=1, max_size=3)),
    max_leaves=4,
)
DEFS = {
    "X": {"type": ["object", "array"]},
    "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "integer"}]},
}


def tools(**fields):
    parameters = {"type": "object", "properties": fields, "$defs": DEFS}
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def is_plain(value) -> bool:
    """Return whether no line of a string is a tag."""
    return not isinstance(value, str) or not any(line in TAGS for line in value.split("\n"))


def meanings(value, schema) -> list:
    """Return the values that a schema accepts and that are written like this one."""
    text = as_text(value)
    found = [text, None, True, False]
    with contextlib.suppress(ValueError, RecursionError):
        found.append(json.loads(text))
    root = {"$defs": DEFS}
    alike = [v for v in found if as_text(v) == text or (isinstance(v, list | dict) and v == value)]
    kept = [v for v in alike if accepts(schema, v, root)]
    return [v for i, v in enumerate(kept) if not any(v == w and type(v) is type(w) for w in kept[:i])]


@tries(500, 83)
@given(st.dictionaries(st.sampled_from("abc"), st.tuples(values, schemas), max_size=3), st.integers(1, 2))
def test_a_call_that_was_written_is_read_back(given_, number):
    """If the schema reads the text of a value in one way, and no line of a string is a tag."""
    one = {k: v for k, (v, s) in given_.items() if is_plain(v) and meanings(v, s) == [v]}
    declared = tools(**{key: schema for key, (_, schema) in given_.items()})
    call = {"name": "f", "arguments": one}
    text = "Let me see.\n" + number * write_call(call)
    assert read_reply(text, declared) == ("Let me see.", number * [call])
    assert [[type(v) for v in c["arguments"].values()] for c in read_calls(text, declared)] == number * [
        [type(v) for v in one.values()]
    ]


@given(
    strings.filter(is_plain),
    st.sampled_from(({"type": "string"}, {"anyOf": [{"type": "string"}, {"type": "integer"}]})),
)
def test_text_stays_text_where_a_string_is_allowed(value, schema):
    assert read_calls(write_call({"name": "f", "arguments": {"a": value}}), tools(a=schema)) == [
        {"name": "f", "arguments": {"a": value}}
    ]


I, N, S = {"type": "integer"}, {"type": "null"}, {"type": "string"}


@pytest.mark.parametrize(
    "text, schema, value",
    [
        ("5", {"anyOf": [I, N]}, 5),
        ("null", {"anyOf": [I, N]}, None),
        ('["a"]', {"anyOf": [{"type": "array", "items": S}, N]}, ["a"]),
        ("true", {"oneOf": [{"type": "boolean"}, N]}, True),
        ('{"a": 1}', {"$ref": "#/$defs/X"}, {"a": 1}),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"enum": [1, "2"]}, "2"),
        ("1", {"enum": [1, "auto"]}, 1),
        ("3", {"enum": [1, 2]}, 3),
        ("123", {"type": ["string", "null"]}, "123"),
        ("123", {"anyOf": [S, N]}, "123"),
        ("123", {"allOf": [{"type": ["string", "integer"]}, I]}, 123),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"type": ["string", "null"]}, None),
        ("null", S, "null"),
        (" null ", {"type": ["string", "null"]}, " null "),
        ("null", I | {"nullable": True}, None),
        ("1", {"const": 1}, 1),
        ("1", {"const": "1"}, "1"),
        ("5.0", I, 5.0),
        ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"),
        ("9" * 5000, I, "9" * 5000),
        ("5", {"type": "int"}, 5),
        ("5", {"type": "quantity"}, "5"),
        ("5", {"type": []}, "5"),
        ("5", {"type": 3, "enum": None, "anyOf": "x"}, "5"),
        ("[1]", {"items": I}, [1]),
        ('{"a": 1}', {"properties": {"a": I}}, {"a": 1}),
        ("5", True, "5"),
        ("5", None, "5"),
        ("5", {}, "5"),
        ("5", False, "5"),
        ("true", {}, "true"),
        ("null", {}, None),
        ("5", {"$ref": "#"}, "5"),
        ("5", {"$ref": "#/$defs/Loop"}, 5),
        ("5", {"$ref": "https://example.com/schema"}, "5"),
    ],
)
def test_the_type_of_an_argument_comes_from_the_whole_schema(text, schema, value):
    call = f"<tool_call>\n<function=f>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
    got = read_calls(call, tools(a=schema))[0]["arguments"]["a"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("parameters", [None, True, {}, {"properties": None}, {"properties": []}, []])
def test_a_function_whose_schema_says_nothing_takes_text(parameters):
    declared = [{"name": "f", "parameters": parameters}]
    call = {"name": "f", "arguments": {"a": "5"}}
    assert read_calls(write_call(call), declared) == [call]


@pytest.mark.parametrize(
    "text, arguments",
    [
        ("<parameter=a>x</parameter><parameter=b>y</parameter></function></tool_call>", {"a": "x", "b": "y"}),
        ("<parameter=a>\nx</parameter>\n<parameter=b>y</parameter></function>", {"a": "x", "b": "y"}),
        ("<parameter=a>\nx</parameter>\n</function>", {"a": "x"}),
        ("<parameter=a>\nx\n<parameter=b>\ny", {"a": "x", "b": "y"}),
        ("<parameter=a>\nx\n  </parameter>\n  <parameter=b>\ny\n  </parameter>\n", {"a": "x", "b": "y"}),
        ("<parameter=a>\n </parameter>\n</parameter>", {"a": " </parameter>"}),
        ("<parameter=a>\nx </parameter> y\n</parameter>", {"a": "x </parameter> y"}),
        ("<parameter=a>\n\n</parameter>", {"a": ""}),
        ("<parameter=a>\n</parameter>", {"a": ""}),
        ("<parameter=a></parameter>", {"a": ""}),
        ("", {}),
    ],
)
def test_values_end_where_their_tag_or_the_next_one_is(text, arguments):
    assert read_calls("<tool_call>\n<function=f>\n" + text, []) == [{"name": "f", "arguments": arguments}]


def test_a_function_that_is_mentioned_in_a_line_is_no_call():
    text = "Write <function=f> to begin one, or `<tool_call>` before it."
    assert read_reply(text, tools()) == (text, [])


def test_the_calls_of_nano_v2_are_json():
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    text = f"Let me see.\n<TOOLCALL>{json.dumps(calls)}</TOOLCALL>"
    assert read_json_reply(text) == ("Let me see.", calls)
    assert read_json_reply(text.removesuffix("</TOOLCALL>")) == ("Let me see.", calls)
    assert read_json_reply(text[:-20]) == (text[:-20], [])


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "", "arguments": {}}],
        [{"name": 5, "arguments": {}}],
        [{"name": "f", "arguments": [1]}],
        [{"name": "f", "arguments": "x"}],
        [{"name": "f", "arguments": 5}],
        [{"name": "f", "arguments": False}],
        [{"name": "f"}, {"name": ""}],
        [{"arguments": {}}],
        [5],
        [],
    ],
)
def test_json_that_is_no_call_stays_text(calls):
    text = f"I call <TOOLCALL>{json.dumps(calls)}</TOOLCALL>"
    assert read_json_reply(text) == (text, [])


@pytest.mark.parametrize("arguments", ["null", '""', "{}", '"{}"'])
def test_arguments_may_be_absent_or_the_text_of_an_object(arguments):
    text = f'<TOOLCALL>[{{"name": "f", "arguments": {arguments}}}, {{"name": "g"}}]</TOOLCALL>'
    assert read_json_reply(text)[1] == [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]
    assert read_json_reply(text.replace(arguments, '"{\\"a\\": 1}"'))[1][0]["arguments"] == {"a": 1}


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just("\ud800"),
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.sampled_from(("name", "arguments", "a")), v),
    max_leaves=5,
)
calls_like = st.fixed_dictionaries(
    {"name": st.sampled_from(("f", "g h", "", "a>b")) | odd}, optional={"arguments": odd}
)


@given(st.lists(calls_like | odd, max_size=3) | odd)
def test_calls_that_were_read_are_written_and_read_back(value):
    """For any JSON that a model writes, because a saved reply is read again."""
    reply = Reply(False)
    reply.push(f"Well.\n<TOOLCALL>{json.dumps(value)}</TOOLCALL>")
    reply.flush()
    message = reply.message([{"name": "f"}], json_calls=True)
    saved = conversation_text([message]).encode().decode()
    assert read_conversation(saved, "talk")[0] == [message]


@given(st.text(max_size=4), st.text(max_size=4))
def test_a_name_that_could_not_be_read_back_is_not_written(name, key):
    call = {"name": name, "arguments": {key: "x"}}
    try:
        text = write_call(call)
    except InputError as error:
        assert "cannot be written in a tool call" in str(error) and "\n" not in str(error)
        assert not name or not key or set(name + key) & set(">\n")
    else:
        assert read_calls(text, []) == [call]

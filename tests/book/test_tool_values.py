"""A tool argument with listed values agrees with a literal reading; JSON distinguishes true from 1."""

from __future__ import annotations

import json

from hypothesis import example, given
from hypothesis import strategies as st

from refengine.spec.tools import as_text, read_value

VALUES = st.sampled_from(
    (True, False, None, 0, 1, -1, 2, 1.0, 0.5, "", "a", "1", "true", "null", "None", "0.5")
)
WORDS = st.sampled_from(
    ("true", "True", "1", "1.0", "null", "None", "0", "a", "", "[1]", "0.50", "-1", "2", "1e999")
)
AS_JSON = {"True": "true", "False": "false", "None": "null"}


def kind(value) -> str:
    """Return the JSON type of a scalar; 1 and 1.0 are different, as in the words of a schema."""
    return {bool: "boolean", int: "integer", float: "number", str: "string"}.get(type(value), "other")


def readings(text: str) -> list:
    """Return the possible values of a text, in the order of preference."""
    try:
        value = json.loads(AS_JSON.get(text.strip(), text))
    except ValueError:
        return [text]
    if isinstance(value, float) and abs(value) == float("inf"):
        return [text]
    return [value, text] if text in ("null", "None") else [text, value]


def read_off(text: str, listed: list):
    """Return the first reading that is a listed value, else the first of a listed type, else the text."""
    for value in readings(text):
        if any(value == one and (kind(value) == "boolean") == (kind(one) == "boolean") for one in listed):
            return value
    for value in readings(text):
        if any(type(value) is type(one) for one in listed):
            return value
    return text


@given(listed=st.lists(VALUES, min_size=1, max_size=4), text=WORDS | VALUES.map(as_text))
@example(listed=[1], text="true")
@example(listed=[0, "a"], text="False")
@example(listed=[True], text="1")
@example(listed=[0.5], text="1e999")
def test_a_listed_value_is_read_as_itself_and_nothing_else_as_it(listed, text):
    expected = read_off(text, listed)
    for schema in ({"enum": listed}, {"anyOf": [{"enum": listed}]}):
        value = read_value(text, schema)
        assert type(value) is type(expected) and value == expected
    if len(listed) == 1:
        value = read_value(text, {"const": listed[0]})
        assert type(value) is type(expected) and value == expected

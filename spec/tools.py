"""Chapter 18. Tools: describe functions to the model, write its calls, and read them back.

    <tool_call>
    <function=NAME>            A value is text. A string is written as it is, a list or an object as JSON,
    <parameter=KEY>            a number, a truth value or null as Python prints it; the schema that the
    VALUE                      function declares decides how the text is read back.
    </parameter>
    </function>
    </tool_call>

Functions are described as in all chat interfaces: {"name", "description", "parameters": JSON schema}. The
form of tags and calls is the family's, the sentences around them are each template's. docs/model.md, "Chat".
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import NamedTuple

from refengine.spec.keys import InputError, shown

INSTRUCTIONS = """To call one, write exactly this and nothing after it:

<tool_call>
<function=name_of_function>
<parameter=name_of_parameter>
value
</parameter>
</function>
</tool_call>

<IMPORTANT>
- Give every required parameter, each in its own block.
- Explain yourself before the call, if at all.
- When no function fits, answer from what you know and do not mention functions.
</IMPORTANT>"""


def describe(tools: list[dict]) -> str:
    """Return the part of the system turn that lists the functions which may be called."""
    functions = "".join(f"<function>\n{signature(function(tool))}</function>\n" for tool in tools)
    return f"# Tools\n\nThese functions may be called:\n\n<tools>\n{functions}</tools>\n\n{INSTRUCTIONS}"


def function(tool: dict) -> dict:
    """Return a function, or the call of one, without the wrapper {"type": "function", "function": ...}."""
    return tool.get("function", tool)


def signature(f: dict) -> str:
    """Return the tags that describe one function: name, description, parameters, which are required."""
    schema = f.get("parameters") or {}
    text = tag("name", f["name"])
    if f.get("description"):
        text += tag("description", f["description"].strip())
    text += "<parameters>\n"
    for name, field in (schema.get("properties") or {}).items():
        field = field if isinstance(field, dict) else {}  # true or null: any value
        known = {key: field[key] for key in ("type", "description", "enum") if key in field}
        tags = "".join(tag(key, value) for key, value in (known | field).items())
        text += f"<parameter>\n{tag('name', name)}{tags}</parameter>\n"
    if schema.get("required"):
        text += tag("required", schema["required"])
    return text + "</parameters>\n"


def tag(name: str, value) -> str:
    """Return a line <name>value</name>."""
    return f"<{name}>{as_text(value).strip()}</{name}>\n"


def as_text(value) -> str:
    """Return a value as the templates write it: lists and objects as JSON, all else as Python prints it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else str(value)


NAME = re.compile(r"[^>\n]+")  # of a function or a parameter


def write_call(call: dict) -> str:
    """Return the text of a call {"name", "arguments": object}, which may be wrapped.

    InputError for a name that could not be read back: an empty one, or one with ">" or a line end in it.
    """
    name, arguments = function(call)["name"], function(call).get("arguments") or {}
    for each in (name, *arguments):
        if not NAME.fullmatch(each):
            raise InputError(f"the name {shown(each)} cannot be written in a tool call")
    blocks = (f"<parameter={key}>\n{as_text(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{''.join(blocks)}</function>\n</tool_call>\n"


# A call begins where <function=NAME> begins a line or follows <tool_call>; both tags after it may be missing.
CALL = re.compile(r"(?:<tool_call>\s*|^[ \t]*)<function=([^>\n]+)>", re.MULTILINE)
# Next in a call: a parameter, or its end. A call also ends where another one begins, or with the text.
PART = re.compile(
    r"<parameter=([^>\n]+)>|</function>(?:\s*</tool_call>)?|</tool_call>|(?=<tool_call>|<function=)|\Z"
)
# A value that begins on a line of its own ends with a line that is a tag; tags inside a line belong to it.
TAG_LINE = re.compile(
    r"^(?:(</parameter>)|</?tool_call>|</function>|<(?:function|parameter)=[^>\n]+>)$|\Z", re.MULTILINE
)
INDENT = re.compile(r"\n[ \t]*\Z")
INLINE_END = re.compile(r"(</parameter>)|(?=</function>|</tool_call>|<parameter=|<function=)|\Z")


def read_calls(text: str, tools: list[dict]) -> list[dict]:
    """Return the calls in a reply, [{"name", "arguments"}], also where tags after the first are missing."""
    return read_reply(text, tools)[1]


def read_reply(text: str, tools: list[dict]) -> tuple[str, list[dict]]:
    """Return (the text around the calls, the calls) of a reply."""
    declared = {f["name"]: f.get("parameters") for f in map(function, tools)}
    calls, words, at = [], "", 0
    while begin := CALL.search(text, at):
        root = declared.get(begin[1])
        fields = root.get("properties") if isinstance(root, dict) else None
        fields = fields if isinstance(fields, dict) else {}
        call = written_call(text, begin.end())
        arguments = {key: read_value(value, fields.get(key), root) for key, value in call.found}
        calls.append({"name": begin[1], "arguments": arguments})
        words, at = words + text[at : begin.start()], call.end
    return (words + text[at:]).strip("\n") if calls else text, calls


class Written(NamedTuple):
    """Holds a call as it is written.

    found    its keys and values as text; of JSON, the calls
    end      where it ends
    certain  whether no text that follows could change the end
    closed   whether it is whole: a tag ends it; of JSON, all of it is calls
    """

    found: list
    end: int
    certain: bool
    closed: bool


def written_call(text: str, at: int) -> Written:
    """Return the call whose <function=NAME> ends at `at`."""
    values, certain = [], True
    while (part := following(PART, text, at))[1]:
        value, at, ended = value_text(text, part.end())
        certain &= ended
        values.append((part[1], value))
    certain &= part[0].endswith("</tool_call>") and text.startswith("\n", part.end())
    return Written(values, part.end(), certain, bool(part[0]))


def value_text(text: str, start: int) -> tuple[str, int, bool]:
    """Return (a value as written from `start` on, where the text goes on after it, whether a tag ends it)."""
    block = text.startswith("\n", start)
    end = following(TAG_LINE if block else INLINE_END, text, start + block)
    ended = bool(end[0]) or end.start() < len(text)
    if block and not end[1] and "</parameter>" in text[start : end.start()]:  # written as "VALUE</parameter>"
        end = following(INLINE_END, text, start)
        value = INDENT.sub("", text[start : end.start()]).removeprefix("\n")
    else:
        value = text[start : end.start()].removeprefix("\n").removesuffix("\n")
    return value, end.end() if end[1] else end.start(), ended


def following(pattern: re.Pattern, text: str, at: int) -> re.Match:
    """Return the next match of a pattern that matches the end of a text, if nothing before."""
    found = pattern.search(text, at)
    assert found is not None
    return found


def read_value(text: str, schema, root=None):
    """Return the value that a text means: null, or the text itself, or what it is as JSON.

    It is the first of the three that the schema accepts; where it accepts none, the first whose type it
    accepts; else the text. `root` is the schema of all parameters, in which "$ref" is looked up.
    """
    readings = [text]
    with contextlib.suppress(ValueError, RecursionError):
        value = from_json(AS_IN_JSON.get(text.strip(), text))
        readings.insert(0 if text in ("null", "None") else 1, value)
    for exact in (True, False):
        for value in readings:
            if accepts(schema, value, root, exact):
                return value
    return text


AS_IN_JSON = {"True": "true", "False": "false", "None": "null"}  # templates write these as Python does


def finite(text: str) -> float:
    """Return a number; ValueError where it is too large for one (JSON has no infinity)."""
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def writable(value):
    """Return a JSON value; ValueError where a text in it has half of a character, which no file can hold."""
    json.dumps(value, ensure_ascii=False).encode()
    return value


def from_json(text: str):
    """Return the value of JSON text; ValueError where JSON could not write it again."""
    return writable(json.loads(text, parse_constant=finite, parse_float=finite))


TYPE_OF = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
ALIASES = {
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
}


def accepts(schema, value, root=None, exact: bool = True, seen: tuple = ()) -> bool:
    """Return whether a JSON schema accepts a value, by its types, enum, const, $ref, anyOf, oneOf and allOf.

    Only the value itself is looked at, not what a list or an object holds. Not `exact`: of enum and const
    only the types count. A schema that is no object (true, null) accepts everything.
    """
    if not isinstance(schema, dict) or len(seen) > 64:
        return True
    if schema.get("nullable") is True and value is None:  # as OpenAPI 3.0 writes it
        return True
    kind = TYPE_OF.get(type(value), "null")
    whole = kind == "integer" or (kind == "number" and value.is_integer())  # 5.0 is an integer too
    kinds = {"integer", "number"} if whole else {kind}
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    types = {ALIASES.get(name, name) for name in types if isinstance(name, str)} & {*TYPE_OF.values(), "null"}
    if not types and not schema.keys() & {"anyOf", "oneOf", "allOf", "$ref", "enum", "const"}:
        types = {type_ for key, type_ in (("properties", "object"), ("items", "array")) if key in schema}
    if types and not types & kinds:
        return False
    listed = list(schema["enum"]) if isinstance(schema.get("enum"), list) else []
    listed += [schema["const"]] if "const" in schema else []
    if listed and not any(same(value, one) if exact else type(value) is type(one) for one in listed):
        return False
    here = (*seen, id(schema))
    if isinstance(path := schema.get("$ref"), str):
        target = resolve(path, root)
        if target is not None and (id(target) in here or not accepts(target, value, root, exact, here)):
            return False  # a schema that refers to itself adds nothing to what it accepts otherwise
    some = [schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) and schema[key]]
    parts = list(schema["allOf"]) if isinstance(schema.get("allOf"), list) else []
    return all(any(accepts(one, value, root, exact, here) for one in options) for options in some) and all(
        accepts(one, value, root, exact, here) for one in parts
    )


def same(a, b) -> bool:
    """Return whether two JSON values are equal; unlike in Python, true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def resolve(path: str, root):
    """Return the schema that "#/a/b" names within `root`; None (everything) where there is none."""
    where, names = root, path.removeprefix("#").strip("/")
    if not path.startswith("#"):
        return None
    for name in names.split("/") if names else ():
        name = name.replace("~1", "/").replace("~0", "~")
        where = where.get(name) if isinstance(where, dict) else None
    return where


JSON_CALLS = re.compile(r"<TOOLCALL>\s*(?=[\[{])")
JSON_END = re.compile(r"\s*</TOOLCALL>")


def read_json_reply(text: str) -> tuple[str, list[dict]]:
    """Return (the text around the calls, the calls) of a reply as Nemotron Nano v2 writes it.

    Its calls are <TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>. A list that is cut off, or
    holds anything but calls, gives none and stays in the text.
    """
    calls, words, at = [], "", 0
    while begin := JSON_CALLS.search(text, at):
        call = written_json(text, begin.end())
        calls += call.found
        words, at = words + text[at : begin.start() if call.found else call.end], call.end
    return (words + text[at:]).strip("\n") if calls else text, calls


def written_json(text: str, at: int) -> Written:
    """Return the calls in JSON that begins at `at`, behind <TOOLCALL>."""
    try:
        value, at = json.JSONDecoder(parse_constant=finite, parse_float=finite).raw_decode(text, at)
        writable(value)
    except (ValueError, RecursionError):
        return Written([], len(text), False, False)
    end = JSON_END.match(text, at)
    found = [json_call(one) for one in (value if isinstance(value, list) else [value])]
    calls = [call for call in found if call] if all(found) else []
    return Written(calls, end.end() if end else at, bool(end), bool(calls))


def json_call(value) -> dict | None:
    """Return {"name", "arguments": object}; None for a value that is no call.

    Arguments may be absent or null (none), or the JSON text of an object.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments.strip() or "{}")
        except (ValueError, RecursionError):
            return None
    arguments = {} if arguments is None else arguments
    return {"name": value["name"], "arguments": arguments} if isinstance(arguments, dict) else None


# A call of either form; a mention of <tool_call> is none.
BEGINNING = re.compile(r"<tool_call>\s*<function=[^>\n]+>|<TOOLCALL>\s*(?=[\[{])")


def end_of_call(text: str, begin: re.Match, thinking: bool = False) -> tuple[int | None, bool]:
    """Return (where the call that BEGINNING has found ends, whether that is certain).

    In a thought the end is None for a call that is only mentioned: one that is not whole where </think>
    follows.
    """
    read = written_json if begin[0].startswith("<TOOLCALL>") else written_call
    until = text.find("</think>", begin.end()) if thinking else -1
    call = read(text if until < 0 else text[:until], begin.end())
    if until < 0:
        return call.end, call.certain and (call.closed or not thinking)
    return call.end if call.closed else None, True

"""Chapter 18. Tools: how the model is told of functions, how it calls one, and how its calls are read.

    <tool_call>
    <function=NAME>            A value is text. Text stays as it is; numbers, lists and the like are
    <parameter=KEY>            written as JSON, and read back by the type that the function declares.
    VALUE
    </parameter>
    </function>
    </tool_call>

Functions are described as in all chat interfaces: {"name", "description", "parameters": JSON schema}. The
form of tags and calls is the family's, the sentences around them are each template's. docs/model.md, "Chat".
"""

from __future__ import annotations

import json
import re

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
    """What the system turn says of the functions that may be called."""
    functions = "".join(f"<function>\n{signature(function(tool))}</function>\n" for tool in tools)
    return f"# Tools\n\nThese functions may be called:\n\n<tools>\n{functions}</tools>\n\n{INSTRUCTIONS}"


def function(tool: dict) -> dict:
    """Interfaces wrap a function, and the call of one, as {"type": "function", "function": ...}."""
    return tool.get("function", tool)


def signature(f: dict) -> str:
    schema = f.get("parameters") or {}
    text = tag("name", f["name"])
    if f.get("description"):
        text += tag("description", f["description"].strip())
    text += "<parameters>\n"
    for name, field in (schema.get("properties") or {}).items():
        known = {key: field[key] for key in ("type", "description", "enum") if key in field}
        tags = "".join(tag(key, value) for key, value in (known | field).items())
        text += f"<parameter>\n{tag('name', name)}{tags}</parameter>\n"
    if schema.get("required"):
        text += tag("required", schema["required"])
    return text + "</parameters>\n"


def tag(name: str, value) -> str:
    return f"<{name}>{as_text(value).strip()}</{name}>\n"


def as_text(value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else str(value)


def write_call(call: dict) -> str:
    name, arguments = function(call)["name"], function(call).get("arguments") or {}
    blocks = (f"<parameter={key}>\n{as_text(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{''.join(blocks)}</function>\n</tool_call>\n"


# A call or a value ends where its end is written, or where the next one begins, or with the text.
CALL = re.compile(r"<function=([^>]+)>(.*?)(?:</function>|</tool_call>|(?=<function=)|\Z)", re.DOTALL)
ARGUMENT = re.compile(r"<parameter=([^>]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


def read_calls(text: str, tools: list[dict]) -> list[dict]:
    """The calls in a reply, also if the model forgot a tag around one or after one."""
    declared = {f["name"]: (f.get("parameters") or {}).get("properties") or {} for f in map(function, tools)}
    calls = []
    for name, body in CALL.findall(text):
        types = {key: field.get("type", "string") for key, field in declared.get(name, {}).items()}
        arguments = {key: as_value(text, types.get(key, "string")) for key, text in ARGUMENT.findall(body)}
        calls.append({"name": name, "arguments": arguments})
    return calls


def as_value(text: str, declared: str | list):
    """A value as its declared type; text that is not of that type stays text."""
    text = text.removeprefix("\n").removesuffix("\n")
    if declared == "string":
        return text
    try:
        return json.loads(AS_IN_JSON.get(text, text))
    except (ValueError, RecursionError):
        return text


AS_IN_JSON = {"True": "true", "False": "false", "None": "null"}  # templates write these as Python does

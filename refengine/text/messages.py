"""Convert messages from the forms of clients to the one form of templates; read files of messages."""

from __future__ import annotations

import json

from refengine.spec.config import InputError
from refengine.untrusted import parse_json, shown

# Names of roles, and under which the templates know them.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
ROLES |= {"function": "tool"}
TEXT_PARTS = ("text", "input_text", "output_text", None)  # None: a part without a type
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def normalised(messages) -> list[dict]:
    """Return messages in one form; InputError, in a sentence, where one cannot be read.

    Content becomes a text; a thought is `reasoning_content`; a call is {"type": "function", "function":
    {"name", "arguments": object}}. Other keys stay.
    """
    if not isinstance(messages, list):
        raise InputError(f"messages have to be a list, not {shown(messages)}")
    return [message_of(message) for message in messages]


def message_of(message) -> dict:
    """Return one message in the form that `normalised` describes."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"a message needs a role and a content: {shown(message)}")
    role = ROLES.get(message["role"])
    if role is None:
        raise InputError(f"the role {shown(message['role'])} of a message is not one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if message.get("function_call"):  # the older form, of one call
        calls = [message["function_call"], *(calls or [])]
    thought, content = thought_of(message), message.get("content")
    if "content" not in message and not (role == "assistant" and (calls or thought)):
        raise InputError(f"a message of the role {message['role']} has no content")
    text, thought_part = content_of(content)
    new = {k: v for k, v in message.items() if k not in (*THOUGHTS, "tool_calls", "function_call")}
    new |= {"role": role, "content": text}
    if thought or thought_part:
        new["reasoning_content"] = thought or thought_part
    if calls:
        if not isinstance(calls, list):
            raise InputError(f"tool_calls has to be a list of calls, not {shown(calls)}")
        new["tool_calls"] = [call_of(call) for call in calls]
    return new


def content_of(content) -> tuple[str, str]:
    """Return (text, thought) of a content: a text, nothing, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list):
        raise InputError(f"the content of a message has to be text or a list of parts, not {shown(content)}")
    text = thought = ""
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else part
        if isinstance(part, dict) and kind in TEXT_PARTS and isinstance(part.get("text"), str):
            text += part["text"]
        elif isinstance(part, dict) and kind == "thinking" and isinstance(part.get("thinking"), str):
            thought += part["thinking"]
        else:
            raise InputError(f"a part of a message is {shown(kind)}: this model reads text only")
    return text, thought


def thought_of(message: dict) -> str:
    """Return the thought of a message, by whichever name it has one."""
    for name in THOUGHTS:
        if not isinstance(thought := message.get(name) or "", str):
            raise InputError(f"{name} of a message has to be text, not {shown(thought)}")
        if thought:
            return thought
    return ""


def call_of(call) -> dict:
    """Return a call in its wrapper, the arguments as an object."""
    wrapper = call if isinstance(call, dict) else {}
    f = wrapper["function"] if isinstance(wrapper.get("function"), dict) else wrapper
    if not isinstance(f.get("name"), str) or not f["name"]:
        raise InputError(f"a call in tool_calls needs the name of a function: {shown(call)}")
    arguments = f.get("arguments")
    if isinstance(arguments, str):
        arguments = arguments.strip() or "{}"
        arguments = parse_json(
            arguments.encode(errors="replace"), f"the text of the arguments of {shown(f['name'])}"
        )
    if not isinstance(arguments := arguments or {}, dict):
        raise InputError(
            f"the arguments of the call of {shown(f['name'])} have to be an object: {shown(arguments)}"
        )
    kept = {key: wrapper[key] for key in ("id",) if key in wrapper}
    return kept | {"type": "function", "function": {"name": f["name"], "arguments": arguments}}


def tools_of(tools, name: str = "tools") -> list[dict]:
    """Return a checked list of tools: functions with a name, each with or without its wrapper."""
    if isinstance(tools, dict):
        tools = tools.get("tools", [tools])
    good = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    for tool in tools if good else ():
        f = tool.get("function", tool)
        good = good and isinstance(f, dict) and isinstance(f.get("name"), str) and bool(f["name"])
    if not good:
        raise InputError(f'{name} have to be a list of functions, each with a "name" and its "parameters"')
    return tools


def read_conversation(text: str, name: str) -> tuple[list[dict], list[dict]]:
    """Return (messages, tools) of a file of messages; `name` names it in a sentence.

    The text is a JSON list, an object with "messages" and perhaps "tools", or one message a line.
    """
    text = text.removeprefix("\ufeff")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(is_object(line) for line in lines):
        value = [parse_json(line.encode(errors="replace"), name) for line in lines]
    else:
        value = parse_json(text.encode(errors="replace"), name)
    tools: list[dict] = []
    if isinstance(value, dict) and "messages" in value:
        tools = tools_of(value["tools"], f"the tools in {name}") if value.get("tools") else []
        value = value["messages"]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise InputError(f"{name} is not a list of messages")
    try:
        return normalised(value), tools
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def is_object(line: str) -> bool:
    """Return whether a line by itself is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def conversation_text(messages: list[dict], tools: list[dict] | None = None) -> str:
    """Return messages, and tools if there are any, as the text of a file that `read_conversation` reads."""
    value = {"messages": messages, "tools": tools} if tools else messages
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"

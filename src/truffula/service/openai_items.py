"""OpenAI's chat messages and tools to items: for every dialect that carries this form, and for ``LLM``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from truffula.errors import InvalidRequest
from truffula.items import Item, Message, Reasoning, Refusal, Role, Text, Tool, ToolCall, ToolChoice, ToolResult
from truffula.json_text import json_value
from truffula.text.chat_template import plain

ROLES: tuple[str, ...] = get_args(Role)
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The keys under which clients send back what a model thought; the first that is given counts."""
_READ = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", *REASONING))
_TOOL_NAME = re.compile(r"[^\x00-\x1f]{1,256}", re.DOTALL)


def messages_from_openai(messages: Any, where: str = "messages") -> list[Message]:
    """``messages`` as items. Keys that the API does not define go to the chat template (``Message.extra``).

    Raises ``InvalidRequest``, which names the place of what is no conversation in text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest(f"{where} must be a list with at least one message.", param=where)
    return [
        message if isinstance(message, Message) else _message(message, f"{where}[{index}]")
        for index, message in enumerate(messages)
    ]


def tools_from_openai(tools: Any, where: str = "tools") -> list[Tool] | None:
    """``tools`` as functions that the model may call; None where there are none. Raises ``InvalidRequest``."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise InvalidRequest(f"{where} is a {type(tools).__name__}; it must be a list.", param=where)
    found = [tool if isinstance(tool, Tool) else _tool(tool, f"{where}[{index}]") for index, tool in enumerate(tools)]
    seen: set[str] = set()
    for index, tool in enumerate(found):
        if tool.name in seen:
            raise InvalidRequest(
                f"{where}[{index}] has the name {tool.name[:80]!r} of an earlier tool; a call could mean either.",
                param=f"{where}[{index}].function.name",
            )
        seen.add(tool.name)
    return found or None


def function_from_openai(given: Any, where: str) -> Tool:
    """A function's description: an item of ``functions``, or ``function`` of a tool. Raises ``InvalidRequest``."""
    function = _object(given, where)
    name = function.pop("name", None)
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}.name is {_shown(name)}; a function needs a name of 1 to 256 characters, none of them a control "
            "character.",
            param=f"{where}.name",
        )
    description, strict = function.pop("description", None), function.pop("strict", None)
    parameters = function.pop("parameters", None)
    for key, value, kind in (
        ("description", description, str),
        ("strict", strict, bool),
        ("parameters", parameters, dict),
    ):
        if value is not None and not isinstance(value, kind):
            raise InvalidRequest(
                f"{where}.{key} is {_shown(value)}; it must be {_KINDS[kind]}.", param=f"{where}.{key}"
            )
    extra = {key: value for key, value in function.items() if value is not None}
    return Tool(
        name=name, description=description or "", parameters=parameters, strict=bool(strict), extra=extra
    )  # fmt: skip


_KINDS: Mapping[type, str] = {str: "a string", bool: "true or false", dict: "an object (a JSON Schema)"}


def _tool(given: Any, where: str) -> Tool:
    tool = _object(given, where)
    kind = tool.get("type", "function")
    if kind != "function":
        raise InvalidRequest(
            f"{where} has the type {_shown(kind)}; this server calls tools of type 'function' only.",
            param=f"{where}.type",
        )
    if "function" not in tool:
        raise InvalidRequest(
            f"{where} has no function, the object with name, description and parameters.", param=f"{where}.function"
        )
    return function_from_openai(tool["function"], f"{where}.function")


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} is a {type(given).__name__}, not an object.", param=where)
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where} has no role.", param=f"{where}.role")
    if role not in (*ROLES, "function"):
        raise InvalidRequest(
            f"{where}.role is {_shown(role)}; it must be one of {', '.join(ROLES)}.", param=f"{where}.role"
        )
    name = _string(given, "name", where)
    extra = {key: plain(value, where) for key, value in given.items() if key not in _READ and value is not None}
    if extra.get("audio"):
        raise InvalidRequest(
            f"{where}.audio refers to audio; this model reads text only.", param=f"{where}.audio"
        )  # fmt: skip
    if role in ("tool", "function"):
        texts = _content(given.get("content"), f"{where}.content")
        text = "\n".join(item.text for item in texts)
        result = ToolResult(_string(given, "tool_call_id", where), text, name)
        return Message(role="tool", items=[result], extra=extra)
    items: list[Item] = _reasoning(given, where)
    items += _content(given.get("content"), f"{where}.content")
    if refusal := _string(given, "refusal", where):
        items.append(Refusal(refusal))
    items += _calls(given, where)
    if (call_id := given.get("tool_call_id")) is not None:
        extra["tool_call_id"] = plain(call_id, where)
    return Message(role=role, items=items, name=name, extra=extra)  # type: ignore[arg-type]  # checked above


def _reasoning(given: Mapping[str, Any], where: str) -> list[Item]:
    key = next((name for name in REASONING if given.get(name) is not None), None)
    return [] if key is None else [Reasoning(_string(given, key, where))]


def _content(content: Any, where: str) -> list[Text | Refusal]:
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(str.__str__(content))]
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{where} is a {type(content).__name__}; it must be text or a list of parts.", param=where)
    return [_content_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _content_part(part: Any, where: str) -> Text | Refusal:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{where} is a {type(part).__name__}; a part is an object.", param=where)
    kind = part.get("type", "text")
    if kind not in (*TEXT_PARTS, "refusal"):
        raise InvalidRequest(
            f"{where} is a part of type {_shown(kind)}; this model reads text parts only.", param=where
        )
    key = "refusal" if kind == "refusal" else "text"
    text = part.get(key)
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.{key} is {_shown(text)}; it must be a string.", param=f"{where}.{key}")
    return Refusal(text) if kind == "refusal" else Text(text)


def _calls(given: Mapping[str, Any], where: str) -> list[ToolCall]:
    """The calls of an assistant's message. ``function_call`` is the older form of one."""
    calls = given.get("tool_calls")
    if calls is not None and not isinstance(calls, list | tuple):
        raise InvalidRequest(
            f"{where}.tool_calls is a {type(calls).__name__}; it must be a list.", param=f"{where}.tool_calls"
        )
    found = []
    for index, call in enumerate(calls or ()):
        at = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidRequest(f"{at} has no function.", param=at)
        found.append(_call(_string(call, "id", at), function, f"{at}.function"))
    if (older := given.get("function_call")) is not None:
        found.append(_call("", _object(older, f"{where}.function_call"), f"{where}.function_call"))
    return found


def _call(call_id: str, function: Mapping[str, Any], where: str) -> ToolCall:
    name = _string(function, "name", where)
    if not name:
        raise InvalidRequest(f"{where} has no name.", param=f"{where}.name")
    return ToolCall(call_id, name, arguments_from_openai(function.get("arguments"), f"{where}.arguments"))


def arguments_from_openai(given: Any, where: str) -> str:
    """A call's arguments as the JSON text of an object: the API carries text, templates' users write the object.

    Raises ``InvalidRequest`` for what is no JSON of an object, as the arguments of a call that was cut.
    """
    if given is None:
        return "{}"
    if isinstance(given, Mapping):
        return json.dumps(plain(given, where), ensure_ascii=False)
    if not isinstance(given, str):
        raise InvalidRequest(f"{where} is {_shown(given)}; it must be the JSON text of an object.", param=where)
    if not given.strip():
        return "{}"
    try:
        value = json_value(given)
    except ValueError as error:
        raise InvalidRequest(f"{where} is not JSON: {error}", param=where) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is JSON, but not of an object.", param=where)
    plain(value, where)
    return given


def _object(given: Any, where: str) -> dict[str, Any]:
    """A copy of an object, of JSON's types alone."""
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} is {_shown(given)}; it must be an object.", param=where)
    copied: dict[str, Any] = plain(given, where)
    return copied


def _string(given: Mapping[str, Any], key: str, where: str) -> str:
    """``given[key]``, "" where it is null or absent."""
    value = given.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{key} is {_shown(value)}; it must be a string.", param=f"{where}.{key}")
    return str.__str__(value)


def _shown(value: Any) -> str:
    """A value for an error: short ones as they are, others by their type."""
    return repr(value)[:60] if value is None or isinstance(value, str | int | float) else f"a {type(value).__name__}"


def tool_choice_from_openai(
    choice: Any, tools: Sequence[Tool] | None, *, parallel: bool = True, where: str = "tool_choice"
) -> ToolChoice:
    """What ``choice`` says of ``tools``: a mode, a function's name, or one of the objects of chat and of Responses.

    None: ``auto`` with tools. Raises ``InvalidRequest`` for a name that is not of ``tools``, and for a choice that
    demands a call where there are none.
    """
    mode: Any = "auto" if tools else "none"
    names: list[str] = []
    if isinstance(choice, str) and choice in _MODES:
        mode = choice
    elif isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        listed = inner.get("tools") if isinstance(inner, Mapping) else None
        if not isinstance(listed, list | tuple) or not listed or inner.get("mode", "auto") not in ("auto", "required"):
            raise InvalidRequest(
                f"{where} of type 'allowed_tools' needs a mode, 'auto' or 'required', and a list of tools.", param=where
            )
        mode, names = inner.get("mode", "auto"), [_named(tool, f"{where}.tools[{i}]") for i, tool in enumerate(listed)]
    elif choice is not None:  # a named function is called once
        mode, names, parallel = "required", [choice if isinstance(choice, str) else _named(choice, where)], False
    known = [tool.name for tool in tools or ()]
    if mode == "required" and not known:
        raise InvalidRequest(f"{where} demands a tool call; the request has no tools.", param=where)
    for name in names:
        if name not in known:
            shown = ", ".join(known[:20]) or "none"
            raise InvalidRequest(f"{where} names {name[:80]!r}, which is not one of the tools: {shown}.", param=where)
    return ToolChoice(mode=mode, names=tuple(dict.fromkeys(names)), parallel=parallel)


_MODES = get_args(get_type_hints(ToolChoice)["mode"])


def _named(given: Any, where: str) -> str:
    """The function that an object names: ``{"type": "function", "function": {"name"}}``, or ``{"name"}`` itself."""
    inner = given.get("function", given) if isinstance(given, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or given.get("type", "function") != "function":
        raise InvalidRequest(
            f"{where} is {_shown(given)}; it must be one of {', '.join(_MODES)}, or name a function: "
            '{"type": "function", "function": {"name": …}}.',
            param=where,
        )
    return name

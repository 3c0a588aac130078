"""Tools of the Responses API as the item model's, and the names by which an answer's calls find their way back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec.structs import replace

from truffula.errors import InvalidRequest
from truffula.items import Tool, ToolChoice
from truffula.json_text import json_value
from truffula.service.openai_items import function_from_openai

SEARCHES = ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11")
"""Tools of OpenAI's own servers that an answer can do without. Clients send them with every request (Codex)."""
MAX_TOOLS = 1024


class ClientTool(NamedTuple):
    """A tool that OpenAI defines and the client runs. Its calls are items of type ``call``, the arguments in ``held``
    beside ``fixed``; results are items of type ``result``.
    """

    call: str
    held: str
    fixed: Mapping[str, Any]
    result: str
    description: str
    parameters: Mapping[str, Any]


def _object(required: list[str], **properties: Any) -> Mapping[str, Any]:
    found = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return MappingProxyType(found)


_TEXT: Mapping[str, Any] = MappingProxyType({"type": "string"})
_TEXTS: Mapping[str, Any] = MappingProxyType({"type": "array", "items": {"type": "string"}})
_INT: Mapping[str, Any] = MappingProxyType({"type": "integer"})
CLIENT_TOOLS: Mapping[str, ClientTool] = MappingProxyType(
    {
        "local_shell": ClientTool(
            *("local_shell_call", "action", {"type": "exec", "env": {}}, "local_shell_call_output"),
            "Runs a command on the user's machine and returns its output.",
            _object(["command"], command=_TEXTS, timeout_ms=_INT, working_directory=_TEXT),
        ),
        "shell": ClientTool(
            *("shell_call", "action", {}, "shell_call_output"),
            "Runs shell commands on the user's machine and returns their output.",
            _object(["commands"], commands=_TEXTS, timeout_ms=_INT, max_output_length=_INT),
        ),
        "apply_patch": ClientTool(
            *("apply_patch_call", "operation", {}, "apply_patch_call_output"),
            "Creates, updates or deletes a file of the user; diff is in V4A format.",
            _object(
                ["type", "path"],
                type={"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
                path=_TEXT,
                diff=_TEXT,
            ),
        ),
    }
)
_FUNCTION = ("name", "description", "parameters", "strict")
_CUSTOM = "input"  # the one argument under which the text of a custom tool is


@dataclass(frozen=True)
class ToolSet:
    """The tools of one request. ``kinds`` says what a call of each name is: ``function``, ``custom`` or the type of a
    ``ClientTool``; ``spaces`` gives the namespace and the name there. ``ignored`` are tools that the model is not told
    of.
    """

    tools: list[Tool] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    spaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    def call_item(self, name: str, arguments: str, ids: Mapping[str, Any]) -> dict[str, Any]:
        """A finished call as an output item; ``ids`` are its ``id``, ``call_id`` and ``status``."""
        kind = self.kinds.get(name, "function")
        if kind == "custom":
            return {"type": "custom_tool_call", **ids, "name": name, "input": custom_input(arguments)}
        row, found = CLIENT_TOOLS.get(kind), _arguments(arguments)
        if row is not None and set(row.parameters["required"]) <= set(found):  # else the answer was cut within it
            return {"type": row.call, **ids, "status": "completed", row.held: {**row.fixed, **found}}
        space, own = self.spaces.get(name, ("", name))
        more = {"namespace": space} if space else {}
        return {"type": "function_call", **ids, "name": own, **more, "arguments": arguments}


def read_tools(given: Sequence[Mapping[str, Any]]) -> ToolSet:
    """``tools`` of a request. Raises ``InvalidRequest`` for one that this server cannot offer to a model."""
    if len(given) > MAX_TOOLS:
        raise InvalidRequest(f"tools has {len(given)} items; this server allows at most {MAX_TOOLS}.", param="tools")
    found = ToolSet()
    for i, tool in enumerate(given):
        _add(found, tool, f"tools[{i}]")
    return found


def _add(found: ToolSet, tool: Mapping[str, Any], place: str) -> None:
    kind = tool.get("type")
    if kind == "namespace":
        space = text_of(tool, "name", place)
        inner = tool.get("tools")
        if not isinstance(inner, list) or not all(isinstance(one, dict) for one in inner):
            raise InvalidRequest(f"{place}.tools: should be a list of tools.", param=f"{place}.tools")
        for i, one in enumerate(inner):
            _add_named(found, one, f"{place}.tools[{i}]", space)
    elif kind in SEARCHES:
        found.ignored.append(f"{place}(type={kind})")
    elif isinstance(kind, str) and kind in CLIENT_TOOLS:
        row = CLIENT_TOOLS[kind]
        parameters = {**row.parameters}
        _register(found, Tool(name=kind, description=row.description, parameters=parameters, strict=True), kind, place)
    else:
        _add_named(found, tool, place, "")


def _add_named(found: ToolSet, tool: Mapping[str, Any], place: str, space: str) -> None:
    kind = tool.get("type")
    if kind not in ("function", "custom"):
        raise InvalidRequest(
            f"{place}.type {str(kind)[:40]!r} is not supported by this server, which runs no tools itself; use function"
            f", custom, {', '.join(CLIENT_TOOLS)}, or leave it out.",
            param=f"{place}.type",
        )
    if "name" not in tool and isinstance(tool.get("function"), dict):
        raise InvalidRequest(
            f"{place}.function is the form of /v1/chat/completions; on this route name, description and parameters "
            "stand beside type.",
            param=f"{place}.function",
        )
    own = text_of(tool, "name", place)
    name = f"{space}__{own}" if space else own
    made = function_from_openai({key: tool.get(key) for key in _FUNCTION} | {"name": name}, place)
    if kind == "custom":
        parameters, strict = _custom_parameters(tool.get("format"), f"{place}.format")
        made = replace(made, parameters=parameters, strict=strict)
    _register(found, made, str(kind), place)
    found.ignored.extend(
        f"{place}.{key[:64]}" for key, value in tool.items() if value and key not in (*_FUNCTION, "type", "format")
    )
    if space:
        found.spaces[name] = (space, own)


def _register(found: ToolSet, tool: Tool, kind: str, place: str) -> None:
    if tool.name in found.kinds:
        raise InvalidRequest(f"{place}: there are two tools named {tool.name[:80]!r}.", param=f"{place}.name")
    found.kinds[tool.name] = kind
    found.tools.append(tool)


def _custom_parameters(given: Any, place: str) -> tuple[dict[str, Any], bool]:
    """The schema of a custom tool, whose input is one text, and whether it constrains the input."""
    value: dict[str, Any] = {"type": "string"}
    kind = "text" if given is None else given.get("type") if isinstance(given, dict) else None
    if kind == "grammar" and given.get("syntax") == "regex":
        value["pattern"] = f"^(?:{text_of(given, 'definition', place)})$"
    elif kind == "grammar":
        raise InvalidRequest(
            f"{place}.syntax {str(given.get('syntax'))[:40]!r} is not supported by this server; use regex, or "
            "format text.",
            param=f"{place}.syntax",
        )
    elif kind != "text":
        raise InvalidRequest(f"{place}.type: should be text or grammar.", param=f"{place}.type")
    schema = {"type": "object", "properties": {_CUSTOM: value}, "required": [_CUSTOM], "additionalProperties": False}
    return schema, "pattern" in value


def custom_arguments(text: str) -> str:
    """The arguments under which a custom tool's input is in the item model."""
    return json.dumps({_CUSTOM: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The input in the arguments of a custom tool; they whole, where the model wrote others."""
    found = _arguments(arguments)
    inner = found.get(_CUSTOM)
    return inner if isinstance(inner, str) and len(found) == 1 else arguments


def _arguments(text: str) -> dict[str, Any]:
    """The JSON object in ``text``; empty where it is none, which an answer that was cut may leave."""
    try:
        found = json_value(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def text_of(held: Mapping[str, Any], name: str, place: str, default: str | None = None) -> str:
    """The string ``held[name]``; ``default`` where it is absent or null. Raises ``InvalidRequest``."""
    value = held.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise InvalidRequest(f"{place}.{name}: should be a string.", param=f"{place}.{name}")
    return value


def read_choice(given: Any, tools: ToolSet, parallel: bool) -> ToolChoice:
    """``tool_choice`` in all its forms. Raises ``InvalidRequest`` for tools that the request does not offer."""
    if given is None or isinstance(given, str):
        mode = given or "auto"
        if mode not in ("auto", "none", "required"):
            raise InvalidRequest(
                f"tool_choice is {mode[:40]!r}; use auto, none, required or an object.", param="tool_choice"
            )
        return _choice(mode, (), tools, parallel)
    if given.get("type") != "allowed_tools":
        return _choice("required", [_named(given, tools, "tool_choice")], tools, parallel=False)  # it is called once
    mode, allowed = given.get("mode"), given.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest("tool_choice.mode: should be auto or required.", param="tool_choice.mode")
    if not isinstance(allowed, list) or not allowed or not all(isinstance(one, dict) for one in allowed):
        raise InvalidRequest("tool_choice.tools: should be a list of tools.", param="tool_choice.tools")
    names = [_named(one, tools, f"tool_choice.tools[{i}]") for i, one in enumerate(allowed)]
    return _choice(mode, names, tools, parallel)


def _choice(mode: str, names: Iterable[str], tools: ToolSet, parallel: bool) -> ToolChoice:
    if mode == "required" and not tools.tools:
        raise InvalidRequest("tool_choice demands a tool, and tools has none to offer.", param="tool_choice")
    return ToolChoice(mode=mode, names=tuple(names), parallel=parallel)  # type: ignore[arg-type]


def _named(given: Mapping[str, Any], tools: ToolSet, place: str) -> str:
    """The tool that an object of ``tool_choice`` names, as the item model calls it."""
    kind = given.get("type")
    wanted = text_of(given, "name", place) if kind in ("function", "custom") else str(kind)
    space = text_of(given, "namespace", place, "")
    name = f"{space}__{wanted}" if space else wanted
    if tools.kinds.get(name) != kind:
        raise InvalidRequest(f"{place} names {name[:80]!r} ({kind}), which is not among tools.", param=place)
    return name

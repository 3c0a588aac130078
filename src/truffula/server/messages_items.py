"""What Anthropic's Messages API calls ``system``, ``messages`` and ``tools``, as items.

https://docs.claude.com/en/api/messages and the types of the package ``anthropic`` are the reference. Every error names
the place of what it is about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest
from truffula.items import Item, Message, Reasoning, Text, Tool, ToolCall, ToolResult
from truffula.server.foreign_fields import has_no_effect

BILLING_HEADER = "x-anthropic-billing-header:"
"""How a line begins that Claude Code puts before its system prompt. Its value changes with every request, so that no
two prompts have a common beginning in the prefix cache; it is meant for Anthropic's servers, not for a model."""

REMINDER = "<system-reminder>\n{}\n</system-reminder>"
"""A system message after the first turn, as text in the user's turn, in the form that Claude Code uses for such text.
Most chat templates accept a system message at the beginning only."""

# Keys that are read, or that have no effect on a prompt here; null and the values listed have none either.
_KEYS: Mapping[str, Mapping[str, Sequence[Any]]] = MappingProxyType(
    {
        "text": {"citations": [[]]},
        "thinking": {},
        "redacted_thinking": {},
        "tool_use": {"caller": [{"type": "direct"}], "toolset_name": []},
        "tool_result": {"toolset_name": []},
        "tool": {"input_examples": [[]]},
    }
)
_READ: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "text": frozenset({"text"}),
        "thinking": frozenset({"thinking", "signature"}),
        "redacted_thinking": frozenset(),
        "tool_use": frozenset({"id", "name", "input"}),
        "tool_result": frozenset({"tool_use_id", "content", "is_error"}),
        "tool": frozenset(
            {"name", "description", "input_schema", "strict"}
            | {"allowed_callers", "defer_loading", "eager_input_streaming"}
        ),
    }
)
_BLOCKS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "system": ("text",),
        "user": ("text", "tool_result"),
        "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    }
)


@dataclass
class Conversation:
    """``messages`` end with what is to be answered, or with the beginning of the answer (``continues``). ``ignored``
    names keys and blocks that were given and have no effect.
    """

    messages: list[Message] = field(default_factory=list)
    continues: bool = False
    ignored: dict[str, None] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)  # their ids


def read_conversation(system: Any, messages: Sequence[Any]) -> Conversation:
    """``system`` and ``messages`` as items. Turns of one role that follow each other are one message, as in the API.

    Raises ``InvalidRequest``.
    """
    found = Conversation()
    if system is not None:
        _add(found, Message(role="system", items=[*_texts(found, system, "system")]))
    if not messages:
        raise InvalidRequest("messages is an empty list.", param="messages")
    for index, given in enumerate(messages):
        for message in _turn(found, given, f"messages[{index}]"):
            _add(found, message)
    last = found.messages[-1] if found.messages else None
    if last is not None and last.role == "assistant":
        if any(isinstance(item, ToolCall) for item in last.items):
            raise InvalidRequest(
                f"messages[{len(messages) - 1}] ends with a tool_use block; its tool_result must follow in a message "
                "of role user.",
                param="messages",
            )
        found.continues = bool(last.items)
        if not last.items:
            del found.messages[-1]
    if not any(message.role != "system" for message in found.messages):
        raise InvalidRequest("messages has no turn of the user.", param="messages")
    return found


def _add(found: Conversation, message: Message) -> None:
    last = found.messages[-1] if found.messages else None
    if last is not None and last.role == message.role != "tool":
        last.items.extend(message.items)
    elif message.items or message.role != "system":
        found.messages.append(message)


def _turn(found: Conversation, given: Any, where: str) -> Iterator[Message]:
    """The messages of one turn: of a user's, each result of a tool is one of its own."""
    role = given.get("role")
    if role not in tuple(_BLOCKS):  # a dict would hash it, and it may be a list
        raise _wrong(f"{where}.role", role, "it must be user, assistant or system")
    content, where = given.get("content"), f"{where}.content"
    if role == "system":
        texts = [*_texts(found, content, where)]
        if any(message.role != "system" for message in found.messages):
            text = "\n".join([item.text for item in texts])
            yield Message(role="user", items=[Text(REMINDER.format(text))])
        else:
            yield Message(role="system", items=[*texts])
        return
    message = Message(role=role, items=[])
    if isinstance(content, str):
        message.items.extend([Text(content)] if content else ())
    else:
        for place, block in _objects(content, where, "a string or a list of blocks"):
            item = _item(found, block, place, role)
            if isinstance(item, ToolResult):
                if message.items:
                    yield message
                yield Message(role="tool", items=[item])
                message = Message(role=role, items=[])
            elif item is not None:
                message.items.append(item)
        if not message.items and content and role == "user":
            return  # nothing but results
    yield message


def _item(found: Conversation, block: Mapping[str, Any], where: str, role: str) -> Item | None:
    """One block; None for what a prompt cannot hold (text without characters, thinking that only Anthropic reads)."""
    kind = _kind(found, block, where, _BLOCKS[role], f"a message of the {role}")
    if kind == "text":
        text = _string(block, "text", where)
        return Text(text) if text else None
    if kind == "thinking":
        thought = _string(block, "thinking", where)
        return Reasoning(thought) if thought else None
    if kind == "redacted_thinking":
        found.ignored["messages.redacted_thinking"] = None
        return None
    if kind == "tool_use":
        call_id, name, given = _string(block, "id", where), _string(block, "name", where), block.get("input")
        if not isinstance(given, dict):
            raise _wrong(f"{where}.input", given, "it must be an object")
        found.calls.add(call_id)
        return ToolCall(call_id, name, json.dumps(given, ensure_ascii=False))
    call_id = _string(block, "tool_use_id", where)
    if call_id not in found.calls:
        raise _wrong(f"{where}.tool_use_id", call_id, "no tool_use block before it has this id")
    content, is_error = block.get("content"), block.get("is_error")
    if is_error is not None and not isinstance(is_error, bool):
        raise _wrong(f"{where}.is_error", is_error, "it must be true or false")
    if is_error:
        found.ignored["messages.is_error"] = None  # chat templates have no place for it; the text of an error says so
    texts = () if content is None else _texts(found, content, f"{where}.content")
    text = "\n".join([item.text for item in texts])
    return ToolResult(call_id, text, is_error=bool(is_error))


def _texts(found: Conversation, content: Any, where: str) -> Iterator[Text]:
    """A string, or blocks of text. A system prompt's billing header is left out."""
    if isinstance(content, str):
        texts = [content]
    else:
        texts = []
        for place, block in _objects(content, where, "a string or a list of text blocks"):
            _kind(found, block, place, ("text",), where.rpartition(".")[2])
            texts.append(_string(block, "text", place))
    for text in texts:
        kept = text
        if text.startswith(BILLING_HEADER):
            kept = text.partition("\n")[2]
        if kept:
            yield Text(kept)


def _kind(found: Conversation, block: Mapping[str, Any], where: str, allowed: Sequence[str], place: str) -> str:
    """The block's type, one of ``allowed``. Its keys without effect are noted."""
    kind = block.get("type")
    if kind not in allowed:
        raise InvalidRequest(
            f"{where} is a block of type {_shown(kind)}; this server takes text only: in {place}, blocks of type "
            f"{', '.join(allowed)}.",
            param=f"{where}.type",
        )
    note_unread(found.ignored, block, str(kind), "messages")
    return str(kind)


def note_unread(ignored: dict[str, None], given: Mapping[str, Any], kind: str, prefix: str) -> None:
    """Adds to ``ignored`` each key of ``given``, an object of ``kind``, that is not read and whose value may matter."""
    if len(given) <= 2:  # the usual text block
        return
    for key, value in given.items():
        if key in _READ[kind] or key in ("type", "cache_control"):
            continue
        if not has_no_effect(value, _KEYS[kind].get(key, ())):
            ignored[f"{prefix}.{key[:64]}"] = None


def read_tools(tools: Sequence[Mapping[str, Any]], ignored: dict[str, None]) -> list[Tool]:
    """``tools`` as functions that the model may call. Raises ``InvalidRequest``, also for tools that Anthropic's
    servers run.
    """
    found: dict[str, Tool] = {}
    for index, given in enumerate(tools):
        where = f"tools[{index}]"
        kind = given.get("type")
        if kind not in (None, "custom"):
            raise InvalidRequest(
                f"{where} has the type {_shown(kind)}. Send a tool of your own: name, description and input_schema, "
                "without type; tools that Anthropic defines or runs are not served.",
                param=f"{where}.type",
            )
        name, schema = _string(given, "name", where), given.get("input_schema")
        if not 0 < len(name) <= 256 or not name.isprintable():
            raise _wrong(f"{where}.name", name, "a tool needs a name of 1 to 256 printable characters")
        if name in found:
            raise _wrong(f"{where}.name", name, "an earlier tool has this name")
        if not isinstance(schema, dict):
            raise _wrong(f"{where}.input_schema", schema, "it must be an object, a JSON Schema")
        strict, description = given.get("strict"), given.get("description")
        if strict is not None and not isinstance(strict, bool):
            raise _wrong(f"{where}.strict", strict, "it must be true or false")
        if description is not None and not isinstance(description, str):
            raise _wrong(f"{where}.description", description, "it must be a string")
        if not has_no_effect(given.get("defer_loading"), [False]):
            raise _wrong(f"{where}.defer_loading", given["defer_loading"], "this server has no tool search")
        if not has_no_effect(given.get("allowed_callers"), [["direct"]]):
            raise _wrong(f"{where}.allowed_callers", given["allowed_callers"], "the model calls tools directly only")
        note_unread(ignored, given, "tool", "tools")
        found[name] = Tool(name=name, description=description or "", parameters=schema, strict=bool(strict))
    return list(found.values())


def _objects(given: Any, where: str, what: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(given, list):
        raise _wrong(where, given, f"it must be {what}")
    for index, one in enumerate(given):
        place = f"{where}[{index}]"
        if not isinstance(one, dict):
            raise _wrong(place, one, "it must be an object")
        yield place, one


def _string(given: Mapping[str, Any], key: str, where: str) -> str:
    value = given.get(key)
    if not isinstance(value, str):
        raise _wrong(f"{where}.{key}", value, "it must be a string")
    return value


def _wrong(where: str, value: Any, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{where} is {_shown(value)}; {reason}.", param=where)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."

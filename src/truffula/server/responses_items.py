"""Items of the Responses API as ``Message``s."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from truffula.errors import InvalidRequest
from truffula.items import Item, Message, Reasoning, Refusal, Text, ToolCall, ToolResult
from truffula.server.responses_tools import CLIENT_TOOLS, custom_arguments, text_of
from truffula.service.openai_items import arguments_from_openai

_INSTRUCTIONS = ("system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def messages_of(
    instructions: str | None,
    history: Sequence[Any],
    given: str | list[Any],
    stored: Mapping[str, Any] | None = None,
) -> list[Message]:
    """The conversation: ``instructions``, the stored items before the request's, then those. ``stored`` has a list with
    the item of each reference. Raises ``InvalidRequest``.
    """
    found = _Conversation()
    if instructions is not None:
        found.messages.append(Message(role="system", items=[Text(instructions)]))
    for i, item in enumerate(history):
        found.add(item, f"previous_response_id, item {i}")
    if isinstance(given, str):
        found.add({"role": "user", "content": given}, "input")
    else:
        for i, item in enumerate(given):
            reference = reference_of(item)
            for one in [item] if reference is None else (stored or {}).get(f"item:{reference}", [item]):
                found.add(one, f"input[{i}]")
    return found.whole()


def reference_of(item: Mapping[str, Any]) -> str | None:
    """The id of the stored item in whose place ``item`` is."""
    named = item.get("type") == "item_reference" or ("type" not in item and "role" not in item)
    found = item.get("id") if named else None
    return found if isinstance(found, str) else None


def references_in(given: str | list[Any]) -> list[str]:
    """The stored items to which an input refers, each as ``item:`` and its id."""
    found = [] if isinstance(given, str) else [reference_of(item) for item in given]
    return list(dict.fromkeys(f"item:{one}" for one in found if one is not None))


class _Conversation:
    """Messages from items: what one turn of the assistant wrote becomes one message."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._turn: list[Item] = []
        self._calls: set[str] = set()

    def whole(self) -> list[Message]:
        self._end_turn()
        return self.messages

    def add(self, item: Mapping[str, Any], place: str) -> None:
        kind = item.get("type") or "message"
        read = _READERS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise InvalidRequest(
                f"{place}.type {str(kind)[:40]!r} is not supported by this server; leave the item out.",
                param=f"{place}.type",
            )
        read(self, item, place)

    def message(self, item: Mapping[str, Any], place: str) -> None:
        role = item.get("role")
        if role == "assistant":
            self._turn += _parts(item, "content", place)
            return
        if role not in ("user", *_INSTRUCTIONS):
            raise InvalidRequest(
                f"{place}.role: should be user, assistant, system or developer.", param=f"{place}.role"
            )
        self._end_turn()
        parts = _parts(item, "content", place)
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == role and role in _INSTRUCTIONS:
            # Chat templates take one such message
            self.messages[-1] = Message(role=role, items=[*last.items, *parts])
        else:
            self.messages.append(Message(role=role, items=parts))

    def reasoning(self, item: Mapping[str, Any], place: str) -> None:
        parts = texts_of(item, "content", place) or texts_of(item, "summary", place)
        if not parts and item.get("encrypted_content"):
            raise InvalidRequest(
                f"{place}.encrypted_content cannot be read by this server; send the item's content, or leave it out.",
                param=f"{place}.encrypted_content",
            )
        self._turn += [Reasoning(text) for text in parts]

    def function_call(self, item: Mapping[str, Any], place: str) -> None:
        space = text_of(item, "namespace", place, "")
        name = text_of(item, "name", place)
        arguments = arguments_from_openai(item.get("arguments"), f"{place}.arguments")
        self._call(item, place, f"{space}__{name}" if space else name, arguments)

    def custom_call(self, item: Mapping[str, Any], place: str) -> None:
        self._call(item, place, text_of(item, "name", place), custom_arguments(text_of(item, "input", place)))

    def client_call(self, item: Mapping[str, Any], place: str) -> None:
        name, row = next((name, row) for name, row in CLIENT_TOOLS.items() if row.call == item["type"])
        held = item.get(row.held)
        if not isinstance(held, dict):
            raise InvalidRequest(f"{place}.{row.held}: should be an object.", param=f"{place}.{row.held}")
        known = row.parameters["properties"]
        arguments = {key: value for key, value in held.items() if key in known and value is not None}
        self._call(item, place, name, json.dumps(arguments, ensure_ascii=False))

    def _call(self, item: Mapping[str, Any], place: str, name: str, arguments: str) -> None:
        call_id = text_of(item, "call_id", place)
        self._calls.add(call_id)
        self._turn.append(ToolCall(call_id, name, arguments))

    def result(self, item: Mapping[str, Any], place: str) -> None:
        output = item.get("output")
        if isinstance(output, list) and item["type"] == "shell_call_output":
            text = json.dumps(output, ensure_ascii=False)
        elif item["type"] == "apply_patch_call_output":
            text = text_of(item, "output", place, "") or text_of(item, "status", place)
        else:
            text = "\n".join(texts_of(item, "output", place))
        # A local shell's result has its call's id as its own
        call_id = text_of(item, "id" if item.get("call_id") is None and "id" in item else "call_id", place)
        if call_id not in self._calls:
            raise InvalidRequest(
                f"{place}.call_id {call_id[:80]!r} is of no call before it; send the call, too.",
                param=f"{place}.call_id",
            )
        failed = item.get("status") in ("failed", "incomplete")
        self._end_turn()
        result = ToolResult(call_id, text, is_error=failed)
        self.messages.append(Message(role="tool", items=[result]))

    def _end_turn(self) -> None:
        if self._turn:
            self.messages.append(Message(role="assistant", items=self._turn))
            self._turn = []


_READERS: Mapping[str, Callable[[_Conversation, Mapping[str, Any], str], None]] = MappingProxyType(
    {
        "message": _Conversation.message,
        "reasoning": _Conversation.reasoning,
        "function_call": _Conversation.function_call,
        "function_call_output": _Conversation.result,
        "custom_tool_call": _Conversation.custom_call,
        "custom_tool_call_output": _Conversation.result,
        **dict.fromkeys((row.call for row in CLIENT_TOOLS.values()), _Conversation.client_call),
        **dict.fromkeys((row.result for row in CLIENT_TOOLS.values()), _Conversation.result),
    }
)
ITEM_TYPES = tuple(_READERS)
"""Types of items that are understood."""


def texts_of(item: Mapping[str, Any], name: str, place: str) -> list[str]:
    """The texts of ``item[name]``, a string or a list of parts. Raises ``InvalidRequest`` for other parts than text."""
    return [part.text for part in _parts(item, name, place) if isinstance(part, Text)]


def _parts(item: Mapping[str, Any], name: str, place: str) -> list[Item]:
    """The text, or texts, of ``item[name]``. Raises ``InvalidRequest`` for parts that are not text."""
    held, inside = item.get(name), f"{place}.{name}"
    if isinstance(held, str):
        return [Text(held)]
    if held is None and name != "output":
        return []
    if not isinstance(held, list):
        raise InvalidRequest(f"{inside}: should be a string or a list of parts.", param=inside)
    return [_part(part, f"{inside}[{i}]") for i, part in enumerate(held)]


def _part(part: Any, place: str) -> Text | Refusal:
    if not isinstance(part, dict):
        raise InvalidRequest(f"{place}: should be an object.", param=place)
    kind = part.get("type")
    if kind == "refusal":
        return Refusal(text_of(part, "refusal", place))
    if kind == "input_json":
        return Text(json.dumps(part.get("data"), ensure_ascii=False))
    if kind not in _TEXT_PARTS:
        raise InvalidRequest(
            f"{place}.type: this model accepts text only, not parts of type {str(kind)[:40]!r}.", param=f"{place}.type"
        )
    return Text(text_of(part, "text", place))

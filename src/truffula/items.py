"""Items: what conversations and answers consist of, in every API dialect.

A dialect translates its own messages to ``Message``s, and the ``Part``s of an answer to its own events. Chat
templates, tool parsing and streaming know these types only.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Text(msgspec.Struct, frozen=True, tag="text"):
    """Text of a message, or the next part of an answer's text."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, tag="reasoning"):
    """What the model thought before it answered, or the next part of it."""

    text: str


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """A refusal in the history of a conversation. Models refuse in text, so an answer never has one."""

    text: str


class ToolCall(msgspec.Struct, frozen=True, tag="tool_call"):
    """A call of a tool by the model. ``arguments`` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


class ToolResult(msgspec.Struct, frozen=True, tag="tool_result"):
    """What the call ``call_id`` returned. ``name`` is the tool's, "" where the client did not repeat it."""

    call_id: str
    text: str
    name: str = ""
    is_error: bool = False


Item = Text | Reasoning | Refusal | ToolCall | ToolResult


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a conversation.

    Text, reasoning, refusals and calls are in the order in which they were written. A message of role ``tool`` holds
    one ``ToolResult``. ``extra`` holds keys that only the chat template may know (JSON types).
    """

    role: Role
    items: list[Item]
    name: str = ""
    extra: dict[str, Any] = {}


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call. ``parameters`` is a JSON Schema; None: it takes no arguments.

    ``strict``: the arguments of a call are constrained to ``parameters``. ``extra`` holds keys that only the chat
    template may know (JSON types).
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False
    extra: dict[str, Any] = {}

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it, which is OpenAI's form."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": {**function, **self.extra}}


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the model calls tools: it may (``auto``), does not (``none``), or must (``required``).

    ``names``: only these may be called; empty: all. One name with ``required`` is a named tool.
    """

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()
    parallel: bool = True


class ToolCallPart(msgspec.Struct, frozen=True, tag="tool_call_part"):
    """The next part of a tool call in an answer.

    ``index`` numbers the calls of one choice from 0. The first part of a call has its ``id`` and ``name``; later ones
    have neither. The joined ``arguments`` of its parts are the JSON text of an object.
    """

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


Part = Text | Reasoning | ToolCallPart


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer's text must match; compiled by ``service/grammars.py``.

    ``value`` is the JSON text of a schema, of a list of strings (``choice``) or of a structural tag, else the regex or
    the grammar itself. It is "" for ``json_object``. ``param`` is the client's field, for errors.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark", "structural_tag"]
    value: str = ""
    param: str = "response_format"


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled constraint, for the engine. ``source`` is a grammar of llguidance, ``key`` its digest,
    ``vocabulary`` the key of the one it is for."""

    key: str
    source: str
    vocabulary: str = ""

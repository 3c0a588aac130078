"""JSON Schemas of messages and tools, for the OpenAPI document: ``service/openai_items.py`` validates them."""

from __future__ import annotations

from typing import Any

from truffula.service.openai_items import ROLES

_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text", "refusal"]}, "text": {"type": "string"}, "refusal": {"type": "string"}},
}
_CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string"},
                "arguments": {"type": "string", "description": "The JSON text of an object."},
            },
        },
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]},
        "name": {"type": "string", "description": "The author's name; passed to the chat template."},
        "tool_calls": {"type": "array", "items": _CALL, "description": "Calls of an earlier answer."},
        "tool_call_id": {"type": "string", "description": "The call that a tool's message answers."},
        "reasoning_content": {"type": "string", "description": "The reasoning of an earlier answer."},
    },
}
MESSAGES_SCHEMA: dict[str, Any] = {"type": "array", "minItems": 1, "items": _MESSAGE}
_TOOL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string"},
                "description": {"type": "string"},
                "parameters": {"type": "object", "description": "A JSON Schema of the arguments."},
                "strict": {"type": "boolean", "description": "Calls always match parameters."},
            },
        },
    },
}
TOOLS_SCHEMA: dict[str, Any] = {"type": "array", "items": _TOOL}

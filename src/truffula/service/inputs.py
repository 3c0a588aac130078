"""What a caller of ``LLM`` gives, in any form, as fields of ``GenerateRequest``. All raise ``InvalidRequest``."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from truffula.errors import InvalidRequest
from truffula.items import Constraint, Message, ToolChoice
from truffula.service.openai_items import messages_from_openai, tool_choice_from_openai, tools_from_openai

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any] | Message]


def spread(value: Any, single: Any, count: int, name: str) -> list[Any]:
    """One value for each of ``count`` prompts: ``value`` repeated, or its items."""
    if isinstance(value, single):
        return [value] * count
    items = as_list(value, name)
    if len(items) != count:
        raise InvalidRequest(f"{name} has {len(items)} item{'s' * (len(items) != 1)} for {count} prompts.", param=name)
    for item in items:
        if not isinstance(item, single):
            raise InvalidRequest(f"{name} has an item of type {type(item).__name__}.", param=name)
    return items


def constraint_of(given: Constraint | Mapping[str, Any] | None) -> Constraint | None:
    if given is None or isinstance(given, Constraint):
        return given
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            f"constraint is of type {type(given).__name__}; give a JSON Schema as a dict, or a "
            "truffula.Constraint of another kind.",
            param="constraint",
        )
    try:
        return Constraint(kind="json_schema", value=json.dumps(given), param="constraint")
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"constraint is not a JSON Schema: {error}.", param="constraint") from error


def prompt_fields(prompt: Prompt | Messages) -> dict[str, Any]:
    """A prompt of any form as fields of a ``GenerateRequest``."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    listed = as_list(prompt, "prompt")
    chat = listed and all(isinstance(item, Mapping | Message) for item in listed)
    return {"messages": listed} if chat else {"prompt": ids_of(listed, 0)}


def with_items(request: dict[str, Any]) -> dict[str, Any]:
    """``request`` with the messages and tools of OpenAI's form as items; those that are items stay as they are."""
    found = dict(request)
    if request.get("messages") is not None:
        found["messages"] = messages_from_openai(request["messages"])
    if request.get("tools") is not None:
        found["tools"] = tools_from_openai(request["tools"])
    choice = found.pop("tool_choice", None)
    if not isinstance(choice, ToolChoice):
        choice = tool_choice_from_openai(choice, found.get("tools"))
    return {**found, "tool_choice": choice}


def as_list(value: Any, name: str) -> list[Any]:
    """The items of ``value``: a list, a tuple, a numpy array."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        raise InvalidRequest(f"{name} has type {type(value).__name__}; expected a list.", param=name)
    return list(value)


def is_ids(prompts: Any) -> bool:
    """Whether ``prompts`` is one prompt of token ids instead of a list of prompts."""
    listed = as_list(prompts, "prompts")
    return bool(listed) and not isinstance(listed[0], str) and not hasattr(listed[0], "__len__")


def ids_of(prompt: Any, at: int) -> list[int]:
    """Any sequence of integers (numpy's too) as a list of ints."""
    if isinstance(prompt, Mapping | bytes) or not hasattr(prompt, "__iter__"):
        raise InvalidRequest(
            f"prompts[{at}] has type {type(prompt).__name__}; expected text or a list of token ids.", param="prompts"
        )
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError as error:
        raise InvalidRequest(
            f"prompts[{at}] contains an item that is not a token id: {error}", param="prompts"
        ) from error

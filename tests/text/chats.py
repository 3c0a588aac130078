"""Requests with a conversation, for tests of chat templates."""

from __future__ import annotations

from typing import Any

from truffula.service.openai_items import messages_from_openai, tools_from_openai
from truffula.types import GenerateRequest


def chat(
    messages: Any, *, template: str | None = None, variables: Any = None, tools: Any = None, **more: Any
) -> GenerateRequest:
    """A request with ``messages`` and ``tools`` of OpenAI's form."""
    return GenerateRequest(
        messages=messages_from_openai(messages),
        tools=tools_from_openai(tools),
        chat_template=template,
        template_kwargs=variables or {},
        **more,
    )

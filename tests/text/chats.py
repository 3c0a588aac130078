"""Requests with a conversation, for tests of chat templates."""

from __future__ import annotations

from typing import Any

from truffula.types import GenerateRequest


def chat(messages: Any, *, template: str | None = None, variables: Any = None, **more: Any) -> GenerateRequest:
    return GenerateRequest(messages=messages, chat_template=template, template_kwargs=variables or {}, **more)

"""Bodies of Anthropic's ``/v1/messages`` and ``/v1/messages/count_tokens``, the latest and the beta form.

Null means absent everywhere, and so does a ``model`` that is absent: the base answers. Fields that these classes do not
have are in ``field_names.toml``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field

from truffula.errors import InvalidRequest
from truffula.items import Constraint, Tool, ToolChoice
from truffula.params import SamplingParams
from truffula.server.body import Address, Body, GeneratingBody, Objects, Strings
from truffula.server.foreign_fields import RouteFields, adapters_named
from truffula.server.limits import RequestLimits
from truffula.server.messages_items import Conversation, read_conversation, read_tools
from truffula.types import GenerateRequest

_OWN_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "messages(role=system)": "system",
        "messages.tool_calls": "messages(type=tool_use)",
        "prompt": "messages",
        "thinking_budget": "thinking.budget_tokens",
    }
)
_CLEAR_THINKING = "clear_thinking_20251015"


class Thinking(Body):
    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Choice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, description="The tool that must be called.")
    disable_parallel_tool_use: bool | None = None


class ContextManagement(Body):
    edits: Objects | None = None


class ConversationBody(GeneratingBody):
    """Fields that both routes share."""

    user_fields: ClassVar[Mapping[str, str]] = MappingProxyType({"metadata": "user_id"})

    model: str | None = None
    messages: Objects
    system: str | Objects | None = None
    tools: Objects | None = None
    tool_choice: Choice | None = Field(default=None, description="auto, any (a tool must be called), tool or none.")
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: ContextManagement | None = None
    cache_control: dict[str, Any] | None = None
    thread: dict[str, Any] | None = None

    def address(self) -> Address:
        return Address([self.model], adapters_named(self, "", "model"), None, None, user=self.end_user)

    def field_of(self, name: str) -> str:
        if name == "reasoning_effort":
            effort = self.output_config is not None and self.output_config.effort
            return "output_config.effort" if effort and self._effort() == effort else "thinking"
        return _OWN_NAMES.get(name, name)

    @cached_property
    def _read(self) -> tuple[Conversation, list[Tool]]:
        conversation = read_conversation(self.system, self.messages)
        return conversation, read_tools(self.tools or (), conversation.ignored)

    def unknown(self) -> list[str]:
        return super().unknown() + list(self._read[0].ignored)

    def chat(self) -> dict[str, Any]:
        """The fields of ``GenerateRequest`` that make its prompt. Raises ``InvalidRequest``."""
        if self.thread is not None:
            # By this code the package's tool runner knows that it must send whole conversations.
            raise InvalidRequest(
                "thread is not supported by this server, which stores no conversations; send the whole conversation.",
                param="thread",
                details={"error_code": "thread_unsupported_request"},
            )
        conversation, tools = self._read
        self._check_context_management()
        return {
            "messages": conversation.messages,
            "tools": tools or None,
            "tool_choice": self._choice(tools),
            "reasoning_effort": self._effort(),
            "continue_final_message": conversation.continues,
            "add_generation_prompt": not conversation.continues,
        }

    def _choice(self, tools: list[Tool]) -> ToolChoice:
        given = self.tool_choice
        if given is None:
            return ToolChoice()
        parallel = not given.disable_parallel_tool_use
        if given.type in ("auto", "none"):
            return ToolChoice(mode=given.type, parallel=parallel)
        if given.type == "any" and tools:
            return ToolChoice(mode="required", parallel=parallel)
        if given.type == "tool" and any(tool.name == given.name for tool in tools):
            return ToolChoice(mode="required", names=(given.name or "",), parallel=parallel)
        asked = f"name {given.name!r}" if given.type == "tool" else "type 'any'"
        raise InvalidRequest(f"tool_choice has the {asked[:80]}, and tools has no such tool.", param="tool_choice")

    def _effort(self) -> str | None:
        """How much the model thinks: "none" is not at all, None as its chat template does."""
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        effort = self.output_config.effort if self.output_config is not None else None
        return effort or (None if self.thinking is None else "medium")

    def _check_context_management(self) -> None:
        """Raise ``InvalidRequest`` for edits that would change the conversation."""
        for index, edit in enumerate((self.context_management and self.context_management.edits) or ()):
            if edit.get("type") == _CLEAR_THINKING and edit.get("keep") in ("all", {"type": "all"}):
                continue
            where = f"context_management.edits[{index}]"
            shown = json.dumps(edit.get("type"))[:60]
            raise InvalidRequest(
                f"{where} of type {shown} is not supported by this server, which reads each conversation as it is "
                f"sent. Leave it out, or send {_CLEAR_THINKING} with keep: all.",
                param=where,
            )


class CountTokensBody(ConversationBody):
    """``POST /v1/messages/count_tokens``."""

    def requests(
        self, limits: RequestLimits, *, streams: bool, stored: Mapping[str, Any] | None = None
    ) -> list[GenerateRequest]:
        return [GenerateRequest(params=SamplingParams(max_tokens=0), **self.chat())]


class MessagesBody(ConversationBody):
    """``POST /v1/messages``."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Strings | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    @property
    def shows_thinking(self) -> bool:
        return self.thinking is None or self.thinking.display != "omitted"

    def requests(
        self, limits: RequestLimits, *, streams: bool, stored: Mapping[str, Any] | None = None
    ) -> list[GenerateRequest]:
        if any(not stop for stop in self.stop_sequences or ()):
            raise InvalidRequest(
                "stop_sequences has an empty string, which matches everywhere.", param="stop_sequences"
            )
        params = SamplingParams(
            **limits.defaults | self.given(("temperature", "top_p", "top_k")),
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences or ()),
        )
        made = GenerateRequest(
            params=params,
            clip_max_tokens=True,
            parse_output=True,
            parse_whole=not streams,
            thinking_budget=self._budget(),
            constraint=self._constraint(),
            queue_timeout_s=limits.queue_timeout_s,
            deadline_s=limits.request_timeout_s,
            **self.chat(),
        )
        return [made]

    def _budget(self) -> int | None:
        if self.thinking is None or self.thinking.type != "enabled":
            return None
        budget = self.thinking.budget_tokens
        if budget is None:
            raise InvalidRequest("thinking.budget_tokens is required by thinking.type 'enabled'.", param="thinking")
        if budget >= self.max_tokens:
            raise InvalidRequest(
                f"thinking.budget_tokens is {budget}; it must be below max_tokens, which is {self.max_tokens}.",
                param="thinking.budget_tokens",
            )
        return budget

    def _constraint(self) -> Constraint | None:
        given = self.output_config.format if self.output_config is not None else None
        param = "output_config.format"
        if given is None:
            given, param = self.output_format, "output_format"
        elif self.output_format is not None:
            raise InvalidRequest(
                "output_format and output_config.format mean the same; give one of them.", param="output_format"
            )
        if given is None:
            return None
        return Constraint(kind="json_schema", value=json.dumps(given.schema_, ensure_ascii=False), param=param)


for _body, _route in ((MessagesBody, "/v1/messages"), (CountTokensBody, "/v1/messages/count_tokens")):
    _body.route_fields = RouteFields(_route, "model", {"": frozenset(_body.model_fields)})

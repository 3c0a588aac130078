"""The body of ``POST /v1/responses``, with the extras of vLLM and SGLang. Null means absent everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from truffula.errors import InvalidRequest
from truffula.items import Constraint
from truffula.server.body import Body, FirstError, Objects, Strings
from truffula.server.constraint_fields import response_format
from truffula.server.foreign_fields import RouteFields
from truffula.server.limits import RequestLimits
from truffula.server.openai_bodies import OpenAIBody
from truffula.server.responses_items import messages_of, references_in
from truffula.server.responses_tools import ToolSet, read_choice, read_tools
from truffula.types import GenerateRequest

INCLUDED = "message.output_text.logprobs"
_NOT_HERE = frozenset(
    {
        *("max_tokens", "n", "best_of", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids"),
        *("add_special_tokens", "response_format"),
    }
)
"""Fields of ``OpenAIBody`` that this route does not have."""
_OWN_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("messages", "prompt"), "input"),
        "max_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning.effort",
        "messages(role=system)": "instructions",
        "messages.tool_calls": "input(type=function_call)",
    }
)
MAX_METADATA = 16


class TextConfig(Body):
    format: dict[str, Any] | None = None
    verbosity: str | None = None

    without_effect: ClassVar[tuple[str, ...]] = ("verbosity",)


class ReasoningConfig(Body):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None

    without_effect: ClassVar[tuple[str, ...]] = ("summary", "generate_summary", "context", "mode")


class ResponsesStreamOptions(Body):
    include_obfuscation: bool | None = None

    without_effect: ClassVar[tuple[str, ...]] = ("include_obfuscation",)


class ResponsesBody(OpenAIBody):
    """``POST /v1/responses``."""

    repeated: ClassVar[tuple[str, ...]] = ("tools", "tool_choice", "metadata")

    input: str | Objects
    instructions: str | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    top_logprobs: int | None = None
    include: Strings | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    metadata: Annotated[dict[str, str], FirstError()] | None = None
    stream_options: ResponsesStreamOptions | None = None  # type: ignore[assignment]  # fewer of them
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1)] | None = None

    @cached_property
    def tool_set(self) -> ToolSet:
        """Raises ``InvalidRequest`` for tools that this server cannot offer."""
        return read_tools(self.tools or ())

    def field_of(self, name: str) -> str:
        return _OWN_NAMES.get(name) or super().field_of(name)

    @property
    def wanted(self) -> list[str]:
        found = [] if self.previous_response_id is None else [f"response:{self.previous_response_id}"]
        return found + references_in(self.input)

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or INCLUDED in (self.include or ())

    def unknown(self) -> list[str]:
        inert = [f"include({name})" for name in self.include or () if name != INCLUDED]
        inert += ["parallel_tool_calls"] if self.parallel_tool_calls is False and not self.tools else []
        return [*super().unknown(), *self.tool_set.ignored, *inert]

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
        if self.input == []:
            raise InvalidRequest("input is an empty list.", param="input")
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise InvalidRequest(
                f"max_output_tokens is {self.max_output_tokens}; it must be at least 1.", param="max_output_tokens"
            )
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise InvalidRequest(f"top_logprobs is {self.top_logprobs}, outside 0..20.", param="top_logprobs")
        if self.truncation == "auto":
            raise InvalidRequest(
                "truncation auto is not supported by this server; send a shorter input, or use disabled.",
                param="truncation",
            )
        if self.background and self.store is False:
            raise InvalidRequest("background needs store: true.", param="background")
        _check_metadata(self.metadata or {})
        super().check()

    def requests(
        self, limits: RequestLimits, *, streams: bool, stored: Mapping[str, Any] | None = None
    ) -> list[GenerateRequest]:
        self.check()
        found = stored or {}
        history = found.get(f"response:{self.previous_response_id}", ())
        shared = self.common(
            limits,
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            logprobs_field="top_logprobs",
            prompt_logprobs=None,
        )
        tools = self.tool_set
        made = GenerateRequest(
            messages=messages_of(self.instructions, history, self.input, found),
            tools=tools.tools or None,
            tool_choice=read_choice(self.tool_choice, tools, self.parallel_tool_calls is not False),
            parse_output=True,
            parse_whole=not streams,
            thinking_budget=None if self.thinking_token_budget == -1 else self.thinking_token_budget,
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            template_kwargs=self.chat_template_kwargs or {},
            **shared,
        )
        return [made]

    @property
    def constraint(self) -> Constraint | None:
        """What ``text.format``, or a field of vLLM or SGLang, asks for. Raises ``InvalidRequest``."""
        form = self.text.format if self.text is not None else None
        own = None if form is None else response_format(form, "text.format")
        other = super().constraint
        if own is not None and other is not None:
            raise InvalidRequest(
                f"text.format and {other.param} both constrain the answer; give one of them.", param=other.param
            )
        return own or other

    def echo(self) -> dict[str, Any]:
        """What a response object repeats of its request."""
        extra = self.model_extra or {}
        text = {"format": {"type": "text"}} if self.text is None else self.text.model_dump(exclude_none=True)
        return {
            "background": bool(self.background),
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": extra.get("max_tool_calls"),
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": extra.get("prompt_cache_key"),
            "reasoning": {"effort": None, "summary": None}
            | ({} if self.reasoning is None else self.reasoning.model_dump(exclude_none=True)),
            "safety_identifier": extra.get("safety_identifier"),
            "service_tier": "default",
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "user": extra.get("user"),
        }


def _check_metadata(given: Mapping[str, str]) -> None:
    if len(given) > MAX_METADATA:
        raise InvalidRequest(f"metadata has {len(given)} keys; at most {MAX_METADATA} are allowed.", param="metadata")
    for key, value in given.items():
        if len(key) > 64 or len(value) > 512:
            raise InvalidRequest("metadata: keys have at most 64 characters, values 512.", param="metadata")


ResponsesBody.route_fields = RouteFields(
    "/v1/responses", "model", {"": frozenset(ResponsesBody.model_fields) - _NOT_HERE}
)

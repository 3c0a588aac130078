"""Bodies of ``/v1/completions`` and ``/v1/chat/completions``, with the extras of vLLM, SGLang and LoRAX.

Null means absent everywhere. Fields of other APIs: ``foreign_fields.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from truffula.errors import InvalidRequest
from truffula.params import MAX_SEED, SamplingParams
from truffula.server.body import Address, Body, FirstError, GeneratingBody, Ids, Objects, Strings
from truffula.server.constraint_fields import OpenAIConstraints
from truffula.server.foreign_fields import RouteFields, adapters_named
from truffula.server.limits import RequestLimits, check_at_most
from truffula.server.openai_schemas import MESSAGES_SCHEMA, TOOLS_SCHEMA
from truffula.service.openai_items import messages_from_openai, tool_choice_from_openai, tools_from_openai
from truffula.types import GenerateRequest

MIN_INT64 = -(2**63)
Prompt = str | list[int]
# Fields that ``SamplingParams`` calls by the same name, on this side and on LoRAX's.
SAME_NAME = (
    *("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    "min_tokens",
)
# Two spellings of one field, both of which are taken.
SAME = (
    ("ignore_eos", "ignore_eos_token"),
    ("include_stop_str_in_output", "no_stop_trim"),
    ("request_id", "rid"),
)


def biases(given: Mapping[str, float] | None, vocab_size: int) -> dict[int, float]:
    """``logit_bias`` by token id; keys are integer strings within the vocabulary."""
    found: dict[int, float] = {}
    for key, value in (given or {}).items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
        if not 0 <= token < vocab_size:
            shown = key[:20]
            raise InvalidRequest(
                f"logit_bias has the key {shown!r}, which is not a token id from 0 to {vocab_size - 1}.",
                param="logit_bias",
            )
        found[token] = value
    return found


def _numbers_only(value: Any) -> Any:
    """Raise ``ValueError`` for the first entry whose value is no number; pydantic would list all of them."""
    if isinstance(value, dict) and not set(map(type, value.values())) <= {int, float}:
        wrong = next(key for key, one in value.items() if type(one) not in (int, float))
        raise ValueError(f"the value of {wrong[:20]!r} is not a number")
    return value


Biases = Annotated[dict[str, float], BeforeValidator(_numbers_only)]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None

    without_effect: ClassVar[tuple[str, ...]] = ("include_obfuscation",)


class OpenAIBody(OpenAIConstraints, GeneratingBody):
    """Fields that both routes share."""

    without_effect: ClassVar[tuple[str, ...]] = ("api_token",)

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    stop: str | Strings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    logit_bias: Biases | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    # vLLM, SGLang
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    rid: str | None = None
    lora_path: Any = Field(default=None, description="Name of an adapter, as in model; SGLang's field.")
    # LoRAX
    adapter_id: Any = Field(default=None, description="Name of an adapter, as in model; LoRAX's field.")
    adapter_source: str | None = None
    merged_adapters: Any = Field(
        default=None, description="Several adapters with weights: ids, weights, merge_strategy, density; LoRAX's field."
    )
    api_token: str | None = Field(default=None, repr=False)
    ignore_eos_token: bool | None = None

    def address(self) -> Address:
        named = adapters_named(self.items(), "", "model")
        sender = self.request_id or self.rid
        return Address([self.model], named, self.adapter_source, self.cache_salt, sender, self.api_token, self.end_user)

    def check(self) -> None:
        """Raises ``InvalidRequest`` for fields that contradict each other."""
        for name, other in SAME:
            one, two = getattr(self, name), getattr(self, other)
            if one is not None and two is not None and one != two:
                raise InvalidRequest(f"{name} and {other} mean the same and differ; give one of them.", param=name)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true.", param="stream_options")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise InvalidRequest("best_of cannot be streamed; leave it out or set stream: false.", param="best_of")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest("prompt_logprobs cannot be streamed; set stream: false.", param="prompt_logprobs")

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.include_usage and self.stream_options and self.stream_options.continuous_usage_stats)

    def common(
        self,
        limits: RequestLimits,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        logprobs_field: str,
        prompt_logprobs: int | None,
    ) -> dict[str, Any]:
        """The fields of ``GenerateRequest`` that both routes fill alike. Raises ``InvalidRequest`` for bad values and
        those above the operator's limits.
        """
        check_at_most(
            ("n", self.n, limits.max_n),
            ("best_of", self.best_of, max(limits.max_best_of, limits.max_n)),
            (logprobs_field, logprobs, limits.max_logprobs),
            ("prompt_logprobs", prompt_logprobs, limits.max_logprobs),
        )
        same_name = self.given((*SAME_NAME, "temperature", "n", "skip_special_tokens"))
        params = SamplingParams(
            **limits.defaults | same_name | ({"top_k": 0} if self.top_k == -1 else {}),
            max_tokens=max_tokens,
            best_of=self.best_of,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos or self.ignore_eos_token),
            include_stop=bool(self.include_stop_str_in_output or self.no_stop_trim),
            seed=self._seed(),
            logit_bias=biases(self.logit_bias, limits.vocab_size),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        return {
            "params": params,
            "constraint": self.constraint,
            "add_special_tokens": self.add_special_tokens,
            "truncate": self._truncation(params.max_tokens, limits),
            "return_prompt_tokens": bool(self.return_token_ids),
            "queue_timeout_s": limits.queue_timeout_s,
            "deadline_s": limits.request_timeout_s,
        }

    def _seed(self) -> int | None:
        """The seed as 64 unsigned bits: a negative int64 is read as its two's complement."""
        if self.seed is None:
            return None
        if not MIN_INT64 <= self.seed <= MAX_SEED:
            raise InvalidRequest(f"seed is {self.seed}, which does not fit in 64 bits.", param="seed")
        return self.seed & MAX_SEED

    def _truncation(self, max_tokens: int | None, limits: RequestLimits) -> int | None:
        """The last n prompt tokens are kept; vLLM's -1 is as many as fit."""
        n = self.truncate_prompt_tokens
        if n == -1:
            return max(1, limits.max_model_len - max(1, max_tokens or 1))
        if n is not None and not 1 <= n < limits.max_model_len:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {n}; it must be at least 1, or -1. A prompt has at most "
                f"{limits.max_model_len - 1} tokens on this server.",
                param="truncate_prompt_tokens",
            )
        return n


class CompletionBody(OpenAIBody):
    """``POST /v1/completions``."""

    prompt: str | Strings | Ids | Annotated[list[Ids], FirstError()]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None

    def prompts(self) -> list[Prompt]:
        """One entry a prompt. An empty list is an error; an empty string is the tokenizer's affair (BOS)."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt is an empty list.", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        for i, one in enumerate(self.prompt):
            if one == []:
                raise InvalidRequest(f"prompt[{i}] is an empty list of token ids.", param="prompt")
        return list(self.prompt)

    @property
    def characters(self) -> int:
        return sum(len(one) for one in self.prompts() if isinstance(one, str))

    def requests(
        self, limits: RequestLimits, *, streams: bool, stored: Mapping[str, Any] | None = None
    ) -> list[GenerateRequest]:
        self.check()
        shared = self.common(
            limits,
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            logprobs_field="logprobs",
            # ``check`` has compared the two
            prompt_logprobs=self.logprobs if self.echo and self.logprobs is not None else self.prompt_logprobs,
        )
        shared |= {"suffix": self.suffix or "", "echo": bool(self.echo)}
        return [GenerateRequest(prompt=prompt, **shared) for prompt in self.prompts()]

    def check(self) -> None:
        super().check()
        if self.echo and None not in (self.logprobs, self.prompt_logprobs) and self.logprobs != self.prompt_logprobs:
            raise InvalidRequest(
                f"echo with logprobs {self.logprobs} and prompt_logprobs {self.prompt_logprobs} ask for different "
                "numbers of the prompt's alternatives; give one of them.",
                param="prompt_logprobs",
            )
        if self.suffix and (self.echo or not all(isinstance(prompt, str) for prompt in self.prompts())):
            what = "echo" if self.echo else "a prompt of token ids"
            raise InvalidRequest(f"suffix cannot be combined with {what}; leave one of them out.", param="suffix")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens is 0, which is allowed only with echo: true.", param="max_tokens")


# ``messages_from_openai`` reads them: it knows the place of an error inside a message.
Messages = Annotated[Objects, WithJsonSchema(MESSAGES_SCHEMA)]
Tools = Annotated[Objects, WithJsonSchema(TOOLS_SCHEMA)]


class ChatBody(OpenAIBody):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    documents: Objects | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def field_of(self, name: str) -> str:
        if name == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return "messages" if name == "prompt" else super().field_of(name)

    def unknown(self) -> list[str]:
        calls = ["parallel_tool_calls"] if self.parallel_tool_calls is False and not self.tools else []
        return super().unknown() + calls

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs and self.top_logprobs != 0:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise InvalidRequest(f"top_logprobs is {self.top_logprobs}, outside 0..20.", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.", param="continue_final_message"
            )
        for name in ("max_completion_tokens", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InvalidRequest(f"{name} is {value}; it must be at least 1.", param=name)
        if self.thinking_token_budget is not None and self.thinking_token_budget < -1:
            raise InvalidRequest(
                f"thinking_token_budget is {self.thinking_token_budget}; it must be at least 0, or -1 for no limit.",
                param="thinking_token_budget",
            )
        if self.separate_reasoning is False and self.tools:
            raise InvalidRequest(
                "separate_reasoning: false leaves the answer as the model wrote it, and tools need it parsed; send "
                "only one of them.",
                param="separate_reasoning",
            )

    def requests(
        self, limits: RequestLimits, *, streams: bool, stored: Mapping[str, Any] | None = None
    ) -> list[GenerateRequest]:
        self.check()
        shared = self.common(
            limits,
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            logprobs_field="top_logprobs",
            prompt_logprobs=self.prompt_logprobs,
        )
        tools = tools_from_openai(self.tools)
        budget = self.thinking_token_budget
        last = bool(self.continue_final_message)
        made = GenerateRequest(
            messages=messages_from_openai(self.messages),
            tools=tools,
            tool_choice=tool_choice_from_openai(
                self.tool_choice, tools, parallel=self.parallel_tool_calls is not False
            ),
            parse_output=self.separate_reasoning is not False,
            parse_whole=not streams,
            thinking_budget=None if budget == -1 else budget,
            reasoning_effort=self.reasoning_effort,
            template_kwargs=self.chat_template_kwargs or {},
            documents=self.documents,
            continue_final_message=last,
            add_generation_prompt=not last if self.add_generation_prompt is None else self.add_generation_prompt,
            **shared,
        )
        return [made]


CompletionBody.route_fields = RouteFields("/v1/completions", "model", {"": frozenset(CompletionBody.model_fields)})
ChatBody.route_fields = RouteFields("/v1/chat/completions", "model", {"": frozenset(ChatBody.model_fields)})

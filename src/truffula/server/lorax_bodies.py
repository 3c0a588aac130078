"""The native request of LoRAX and TGI: ``{"inputs", "parameters", "stream"}``.

lorax-client sends every key, most of them null; null means absent. Fields of other APIs: ``foreign_fields.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from truffula.errors import InvalidRequest
from truffula.items import Message, Text
from truffula.params import MAX_SEED, SamplingParams
from truffula.server.body import Address, Body, GeneratingBody, Ids, Objects, Strings
from truffula.server.constraint_fields import NativeConstraints
from truffula.server.foreign_fields import RouteFields, adapters_named
from truffula.server.limits import RequestLimits, check_at_most
from truffula.server.openai_bodies import SAME_NAME, Biases, Messages, biases
from truffula.service.openai_items import messages_from_openai, tools_from_openai
from truffula.types import GenerateRequest

Penalty = Annotated[float, Field(ge=-2, le=2)]


class Parameters(NativeConstraints):
    """How to generate. Every field may be null."""

    refuses_foreign: ClassVar[bool] = True
    without_effect: ClassVar[tuple[str, ...]] = ("api_token",)

    adapter_id: Any = Field(default=None, description="Name of an adapter; null and the base's name mean the base.")
    adapter_source: str | None = None
    merged_adapters: Any = Field(
        default=None, description="Several adapters with weights: ids, weights, merge_strategy, density."
    )
    api_token: str | None = Field(default=None, repr=False)
    best_of: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, lt=1)
    do_sample: bool | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: Strings | None = None
    truncate: int | None = Field(default=None, ge=1)
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = Field(default=None, ge=1)
    top_n_tokens: int | None = Field(default=None, ge=0)
    apply_chat_template: bool | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    # vLLM's and OpenAI's, under their names
    min_p: float | None = Field(default=None, ge=0, le=1)
    min_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: Ids | None = None
    logit_bias: Biases | None = None
    cache_salt: str | None = None
    model: str | None = None

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and "" in value:
            raise ValueError("an empty string would match immediately")
        return value

    @property
    def wants_details(self) -> bool:
        return bool(self.details or self.decoder_input_details)

    @property
    def alternatives(self) -> int:
        return max(self.return_k_alternatives or 0, self.top_n_tokens or 0)

    @property
    def samples(self) -> bool:
        """LoRAX's switch: asked for by name, or by a value that only sampling gives a meaning.

        A temperature of 1.0 alone is the default and switches nothing on; 0 is greedy whatever else is said.
        """
        if self.temperature == 0:
            return False
        return bool(
            self.do_sample
            or self.temperature not in (None, 1.0)
            or self.top_k is not None
            or self.top_p not in (None, 1.0)
            or self.typical_p is not None
            or self.min_p
        )

    def check(self, *, stream: bool, limits: RequestLimits) -> None:
        """Raises ``InvalidRequest`` for fields that contradict each other and values above the operator's limits."""
        check_at_most(
            ("best_of", self.best_of, limits.max_best_of),
            ("return_k_alternatives", self.return_k_alternatives, limits.max_logprobs),
            ("top_n_tokens", self.top_n_tokens, limits.max_logprobs),
            ("truncate", self.truncate, limits.max_model_len - 1),
        )
        if (self.best_of or 1) > 1:
            if not self.samples:
                raise InvalidRequest("best_of above 1 needs sampling: set do_sample or temperature.", param="best_of")
            if self.seed is not None:
                raise InvalidRequest("seed cannot be given with best_of above 1.", param="seed")
            if stream:
                raise InvalidRequest("best_of above 1 cannot be streamed.", param="best_of")
        if stream and self.decoder_input_details:
            raise InvalidRequest("decoder_input_details cannot be streamed.", param="decoder_input_details")

    def sampling(self, *, with_logprobs: bool, vocab_size: int) -> SamplingParams:
        """As ``SamplingParams``. The stop text stays in the output; logprobs are of the distribution drawn from."""
        sampling = self.samples
        best_of = self.best_of or 1
        logprobs = self.alternatives if with_logprobs or self.alternatives else None
        return SamplingParams(
            **self.given(SAME_NAME),
            max_tokens=self.max_new_tokens,
            temperature=(1.0 if self.temperature is None else self.temperature) if sampling else 0.0,
            seed=self.seed if sampling else None,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=biases(self.logit_bias, vocab_size),
            include_stop=True,
            ignore_eos=bool(self.ignore_eos_token),
            n=best_of,
            logprobs=0 if logprobs is None and best_of > 1 else logprobs,
            prompt_logprobs=0 if self.decoder_input_details else None,
            logprobs_of="warped",
        )


class GenerateBody(GeneratingBody):
    """``POST /``, ``/generate`` and ``/generate_stream``."""

    nested: ClassVar[str | None] = "parameters"

    inputs: str = Field(min_length=1)
    parameters: Parameters | None = None
    stream: bool | None = None
    model: str | None = None

    @property
    def params(self) -> Parameters:
        return self.parameters or Parameters()

    @property
    def characters(self) -> int:
        return len(self.inputs)

    @property
    def shown_inputs(self) -> str:
        """The text in front of the answer."""
        return self.inputs if self.params.return_full_text else ""

    def address(self) -> Address:
        params, use = self.params, NATIVE.adapter
        named = adapters_named(self.items(), "", use) + adapters_named(params.items(), "parameters.", use)
        models = [self.model, params.model]
        return Address(models, named, params.adapter_source, params.cache_salt, token=params.api_token)

    def requests(
        self, limits: RequestLimits, *, streams: bool, stored: Mapping[str, Any] | None = None
    ) -> list[GenerateRequest]:
        params = self.params
        params.check(stream=streams, limits=limits)
        chat = [Message(role="user", items=[Text(self.inputs)])] if params.apply_chat_template else None
        made = GenerateRequest(
            prompt=self.inputs if chat is None else None,
            messages=chat,
            params=params.sampling(with_logprobs=streams or params.wants_details, vocab_size=limits.vocab_size),
            constraint=params.constraint,
            truncate=params.truncate,
            return_prompt_tokens=bool(params.decoder_input_details),
            queue_timeout_s=limits.queue_timeout_s,
            deadline_s=limits.request_timeout_s,
        )
        return [made]


NATIVE = RouteFields(
    "this route",
    "parameters.adapter_id",
    {"": frozenset(GenerateBody.model_fields), "parameters.": frozenset(Parameters.model_fields)},
)
GenerateBody.route_fields = NATIVE


class ChatTokenizeBody(Body):
    """``POST /chat_tokenize``, TGI's: a chat, of which only what changes the prompt is read."""

    messages: Messages | None = None
    model: str | None = None
    tools: Objects | None = None
    documents: Objects | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool | None = None

    def chat(self) -> GenerateRequest:
        """The request that ``/v1/chat/completions`` makes of these fields. Raises ``InvalidRequest``."""
        last = bool(self.continue_final_message)
        if last and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.", param="continue_final_message"
            )
        kwargs = dict(self.chat_template_kwargs or {})
        return GenerateRequest(
            messages=messages_from_openai(self.messages),
            tools=tools_from_openai(self.tools),
            reasoning_effort=self.reasoning_effort,
            documents=self.documents,
            template_kwargs=kwargs,
            continue_final_message=last,
            add_generation_prompt=not last if self.add_generation_prompt is None else self.add_generation_prompt,
            add_special_tokens=bool(self.add_special_tokens),
        )


class TokenizeBody(ChatTokenizeBody):
    """``POST /tokenize`` in the form of LoRAX and TGI (``inputs``) or of vLLM (``prompt`` or ``messages``)."""

    inputs: str | None = None
    parameters: Parameters | None = None
    prompt: str | None = None
    return_token_strs: bool | None = None

    def unknown(self) -> list[str]:
        """Tokens do not depend on how to generate, so all of ``parameters`` is without effect."""
        inner = {} if self.parameters is None else self.parameters.model_dump()
        asked = [f"parameters.{name}" for name, value in inner.items() if value not in (None, False, [])]
        return [*(self.model_extra or ()), *asked]


class DetokenizeBody(Body):
    tokens: Ids
    model: str | None = None
    skip_special_tokens: bool | None = None


# What changes the text that a chat template renders, or how it is tokenised. How to generate changes no token, and
# clients count the tokens of a whole request by sending it here.
_TOKEN_FIELDS = (
    *("tools", "functions", "documents", "chat_template", "chat_template_kwargs", "add_generation_prompt"),
    *("continue_final_message", "reasoning_effort", "think", "enable_thinking", "thinking", "system", "instructions"),
    *("apply_chat_template", "add_special_tokens", "skip_special_tokens", "truncate_prompt_tokens", "truncate"),
)
for _body, _where in (
    (TokenizeBody, "/tokenize"),
    (DetokenizeBody, "/detokenize"),
    (ChatTokenizeBody, "/chat_tokenize"),
):
    _body.route_fields = RouteFields(_where, "model", {"": frozenset(_body.model_fields)}, only=_TOKEN_FIELDS)

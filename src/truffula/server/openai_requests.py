"""From OpenAI bodies to ``GenerateRequest``s: limits, truncation, adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace
from starlette.requests import Request

from truffula.errors import InvalidRequest
from truffula.params import SamplingParams
from truffula.server.answering import answering
from truffula.server.auth import prefix_salt
from truffula.server.generating import mark
from truffula.server.limits import RequestLimits
from truffula.server.middleware import request_id
from truffula.server.openai_bodies import ChatBody, CompletionBody, OpenAIBody
from truffula.server.state import ServerState, record_of
from truffula.types import GenerateRequest


def completion_requests(body: CompletionBody, limits: RequestLimits) -> list[GenerateRequest]:
    """One request per prompt, in order; ``addressed`` adds the adapter."""
    body.check()
    check_limits(body, body.logprobs, "logprobs", limits)
    params = body.sampling(
        max_tokens=16 if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        vocab_size=limits.vocab_size,
        prompt_logprobs=body.logprobs if body.echo else None,  # ``check`` has compared the two
        defaults=limits.defaults,
    )
    shared = common(body, params, limits)
    return [GenerateRequest(prompt=prompt, echo=bool(body.echo), **shared) for prompt in body.prompts()]


def chat_requests(body: ChatBody, limits: RequestLimits) -> list[GenerateRequest]:
    """The request of a chat, in a list; ``addressed`` adds the adapter."""
    body.check()
    top = None if not body.logprobs else body.top_logprobs or 0
    check_limits(body, top, "top_logprobs", limits)
    params = body.sampling(
        max_tokens=body.token_limit(), logprobs=top, vocab_size=limits.vocab_size, defaults=limits.defaults
    )
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    last = bool(body.continue_final_message)
    made = GenerateRequest(
        messages=[message.for_template() for message in body.messages],
        template_kwargs=kwargs,
        documents=body.documents,
        continue_final_message=last,
        add_generation_prompt=not last if body.add_generation_prompt is None else body.add_generation_prompt,
        **common(body, params, limits),
    )
    return [made]


def common(body: OpenAIBody, params: SamplingParams, limits: RequestLimits) -> dict[str, Any]:
    """The fields of ``GenerateRequest`` that both routes fill alike."""
    return {
        "params": params,
        "add_special_tokens": body.add_special_tokens,
        "truncate": truncation(body, params, limits),
        "return_prompt_tokens": bool(body.return_token_ids),
        "queue_timeout_s": limits.queue_timeout_s,
        "deadline_s": limits.request_timeout_s,
    }


async def addressed(
    request: Request, body: OpenAIBody, made: Sequence[GenerateRequest], state: ServerState
) -> list[GenerateRequest]:
    """``made`` with adapter, request id and salt, which are also recorded for log and metrics."""
    adapter = await answering(body, state)
    given = body.request_id or body.rid
    if given is not None:
        record_of(request).request_id = request_id(given)
    mark(request, adapter, made[0].params.max_tokens)
    salt = prefix_salt(request, body.cache_salt, state.config.salt_by_api_key)
    name = record_of(request).request_id
    return [replace(one, adapter=adapter, request_id=name, salt=salt) for one in made]


def truncation(body: OpenAIBody, params: SamplingParams, limits: RequestLimits) -> int | None:
    """The last n prompt tokens are kept; vLLM's -1 is as many as fit."""
    n = body.truncate_prompt_tokens
    if n is None:
        return None
    if n == -1:
        return max(1, limits.max_model_len - max(1, params.max_tokens or 1))
    if n < 1:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {n}; it must be at least 1, or -1.", param="truncate_prompt_tokens"
        )
    if n >= (longest := limits.max_model_len):
        raise InvalidRequest(
            f"truncate_prompt_tokens is {n}; a prompt has at most {longest - 1} tokens on this server.",
            param="truncate_prompt_tokens",
        )
    return n


def check_limits(body: OpenAIBody, logprobs: int | None, name: str, limits: RequestLimits) -> None:
    """The operator's bounds on what one request may ask for."""
    rows = (
        ("n", body.n, limits.max_n),
        ("best_of", body.best_of, max(limits.max_best_of, limits.max_n)),
        (name, logprobs, limits.max_logprobs),
        ("prompt_logprobs", body.prompt_logprobs, limits.max_logprobs),
    )
    for field, value, limit in rows:
        if value is not None and value > limit:
            raise InvalidRequest(f"{field} is {value}; this server allows at most {limit}.", param=field, limit=limit)

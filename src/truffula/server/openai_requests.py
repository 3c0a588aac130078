"""From OpenAI bodies to ``GenerateRequest``s: limits, the model rule, who answers."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from truffula.errors import InvalidRequest
from truffula.server.answering import answering
from truffula.server.auth import prefix_salt
from truffula.server.generating import mark
from truffula.server.middleware import request_id
from truffula.server.openai_bodies import ChatBody, CompletionBody, OpenAIBody
from truffula.server.state import ServerState, record_of
from truffula.types import GenerateRequest, SamplingParams


async def completion_requests(request: Request, body: CompletionBody, state: ServerState) -> list[GenerateRequest]:
    """One a prompt, in order."""
    body.check()
    check_limits(body, body.logprobs, "logprobs", state)
    prompts = body.prompts()
    if len(prompts) > state.config.max_prompts:
        raise InvalidRequest(
            f"prompt holds {len(prompts)} prompts; this server allows at most {state.config.max_prompts}.",
            param="prompt",
        )
    params = body.sampling(
        max_tokens=16 if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        vocab_size=state.service.info.vocab_size,
        prompt_logprobs=body.logprobs if body.echo else None,  # ``check`` has compared the two
        defaults=state.defaults,
    )
    shared = await common(request, body, state, params)
    return [GenerateRequest(prompt=prompt, echo=bool(body.echo), **shared) for prompt in prompts]


async def chat_request(request: Request, body: ChatBody, state: ServerState) -> GenerateRequest:
    body.check()
    top = None if not body.logprobs else body.top_logprobs or 0
    check_limits(body, top, "top_logprobs", state)
    limit = body.token_limit()
    params = body.sampling(
        max_tokens=limit, logprobs=top, vocab_size=state.service.info.vocab_size, defaults=state.defaults
    )
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    last = bool(body.continue_final_message)
    return GenerateRequest(
        messages=[message.for_template() for message in body.messages],
        template_kwargs=kwargs,
        documents=body.documents,
        continue_final_message=last,
        add_generation_prompt=not last if body.add_generation_prompt is None else body.add_generation_prompt,
        **await common(request, body, state, params),
    )


async def common(request: Request, body: OpenAIBody, state: ServerState, params: SamplingParams) -> dict[str, Any]:
    """The fields of ``GenerateRequest`` that both routes fill alike; notes them for log and metrics."""
    adapter = await answering(body, state)
    given = body.request_id or body.rid
    if given is not None:
        record_of(request).request_id = request_id(given)
    mark(request, adapter, params.max_tokens)
    return {
        "params": params,
        "adapter": adapter,
        "request_id": record_of(request).request_id,
        "add_special_tokens": body.add_special_tokens,
        "truncate": truncation(body, params, state),
        "salt": prefix_salt(request, body.cache_salt, state.config.salt_by_api_key),
        "return_prompt_tokens": bool(body.return_token_ids),
        "queue_timeout_s": state.config.queue_timeout_s,
        "deadline_s": state.config.request_timeout_s,
    }


def truncation(body: OpenAIBody, params: SamplingParams, state: ServerState) -> int | None:
    """The last n prompt tokens are kept; vLLM's -1 is as many as fit."""
    n = body.truncate_prompt_tokens
    if n is None:
        return None
    if n == -1:
        return max(1, state.service.info.max_model_len - max(1, params.max_tokens or 1))
    if n < 1:
        raise InvalidRequest(
            f"truncate_prompt_tokens is {n}; it must be at least 1, or -1.", param="truncate_prompt_tokens"
        )
    if n >= (longest := state.service.info.max_model_len):
        raise InvalidRequest(
            f"truncate_prompt_tokens is {n}; a prompt has at most {longest - 1} tokens on this server.",
            param="truncate_prompt_tokens",
        )
    return n


def check_limits(body: OpenAIBody, logprobs: int | None, name: str, state: ServerState) -> None:
    """The operator's bounds on what one request may ask for."""
    config = state.config
    stops = 1 if isinstance(body.stop, str) else len(body.stop or ())
    rows = (
        ("n", body.n, config.max_n),
        ("best_of", body.best_of, max(config.max_best_of, config.max_n)),
        (name, logprobs, config.max_logprobs),
        ("prompt_logprobs", body.prompt_logprobs, config.max_logprobs),
    )
    for field, value, limit in rows:
        if value is not None and value > limit:
            raise InvalidRequest(f"{field} is {value}; this server allows at most {limit}.", param=field, limit=limit)
    if stops > config.max_stop_sequences:
        raise InvalidRequest(
            f"stop holds {stops} strings; this server allows at most {config.max_stop_sequences}.", param="stop"
        )

"""LoRAX's and TGI's routes: ``/``, ``/generate``, ``/generate_stream``, ``/invocations``."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.server.answering import answering
from truffula.server.auth import prefix_salt
from truffula.server.body import read_body, read_object, read_value
from truffula.server.generating import mark, stream, whole
from truffula.server.headers import reply_headers, stream_headers
from truffula.server.lorax_bodies import GenerateBody
from truffula.server.lorax_parts import NativeWriter, best_first, details
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.openai_chat import chat
from truffula.server.openai_completions import complete
from truffula.server.replies import json_reply
from truffula.server.state import record_of, state_of
from truffula.types import AdapterRef, GenerateRequest


async def compatible(request: Request) -> Response:
    """Continues a text. The answer is a list with one object, or events with `stream: true`."""
    body = await _body(request)
    return await _stream(request, body) if body.stream else await _whole(request, body, as_list=True)


async def generate(request: Request) -> Response:
    """Continues a text. The answer is one object; `stream` has no effect."""
    return await _whole(request, await _body(request), as_list=False)


async def generate_stream(request: Request) -> Response:
    """Continues a text. The answer is server-sent events, one for each token."""
    return await _stream(request, await _body(request))


async def invocations(request: Request) -> Response:
    """For SageMaker: takes `inputs` as `/` does, `messages` as a chat, `prompt` as a completion."""
    record_of(request).generates = True
    value = await read_object(request)
    state = state_of(request)
    if "messages" in value:
        return await chat(request, read_value(request, ChatBody, value), state)
    if "prompt" in value and "inputs" not in value:
        return await complete(request, read_value(request, CompletionBody, value), state)
    body = read_value(request, GenerateBody, value)
    return await _stream(request, body) if body.stream else await _whole(request, body, as_list=True)


async def _body(request: Request) -> GenerateBody:
    record_of(request).generates = True
    return await read_body(request, GenerateBody)


async def to_request(
    request: Request, body: GenerateBody, *, streams: bool
) -> tuple[GenerateRequest, AdapterRef | None]:
    """The body as a request in text, and who answers it."""
    state, params = state_of(request), body.params
    config = state.config
    params.check(
        stream=streams,
        max_best_of=config.max_best_of,
        max_stops=config.max_stop_sequences,
        max_logprobs=config.max_logprobs,
        max_truncate=state.service.info.max_model_len - 1,
    )
    adapter = await answering(body, state)
    mark(request, adapter, params.max_new_tokens)
    shape: dict[str, Any] = {"prompt": body.inputs}
    if params.apply_chat_template:
        shape = {"messages": [{"role": "user", "content": body.inputs}]}
    made = GenerateRequest(
        **shape,
        params=params.sampling(with_logprobs=streams or params.wants_details, vocab_size=state.service.info.vocab_size),
        adapter=adapter,
        request_id=record_of(request).request_id,
        truncate=params.truncate,
        salt=prefix_salt(request, params.cache_salt, config.salt_by_api_key),
        return_prompt_tokens=bool(params.decoder_input_details),
        queue_timeout_s=config.queue_timeout_s,
        deadline_s=config.request_timeout_s,
    )
    return made, adapter


async def _whole(request: Request, body: GenerateBody, *, as_list: bool) -> Response:
    started = time.monotonic()
    made, adapter = await to_request(request, body, streams=False)
    (found,) = await whole(request, [made])
    choice, *others = best_first(found.choices)
    full = body.inputs if body.params.return_full_text else ""
    reply: dict[str, Any] = {"generated_text": full + choice.text}
    if body.params.wants_details:
        reply["details"] = details(choice, others, found.prompt, body)
    headers = reply_headers(
        len(body.inputs),
        adapter,
        record_of(request),
        state_of(request),
        total_s=time.monotonic() - started,
        completion_tokens=choice.totals.completion_tokens,
    )
    return json_reply([reply] if as_list else reply, headers=headers)


async def _stream(request: Request, body: GenerateBody) -> Response:
    made, adapter = await to_request(request, body, streams=True)
    return await stream(
        request, [made], NativeWriter(body), stream_headers(len(body.inputs), adapter, state_of(request))
    )

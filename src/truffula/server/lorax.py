"""LoRAX's and TGI's routes: ``/``, ``/generate``, ``/generate_stream``, ``/invocations``."""

from __future__ import annotations

import time
from typing import Any

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from truffula.server.answering import answering
from truffula.server.auth import prefix_salt
from truffula.server.generating import mark, stream, whole
from truffula.server.headers import reply_headers, stream_headers
from truffula.server.lorax_bodies import GenerateBody
from truffula.server.lorax_parts import NativeWriter, best_first, details
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.openai_chat import chat
from truffula.server.openai_completions import complete
from truffula.server.prepare import Kind, Read, read_requests
from truffula.server.replies import json_reply
from truffula.server.state import record_of, state_of
from truffula.types import AdapterRef, Completion, GenerateRequest


async def compatible(request: Request) -> Response:
    """Continues a text. The answer is a list with one object, or events with `stream: true`."""
    read = await _read(request, "native")
    return await _stream(request, read) if native(read).stream else await _whole(request, read, as_list=True)


async def generate(request: Request) -> Response:
    """Continues a text. The answer is one object; `stream` has no effect."""
    return await _whole(request, await _read(request, "native_whole"), as_list=False)


async def generate_stream(request: Request) -> Response:
    """Continues a text. The answer is server-sent events, one for each token."""
    return await _stream(request, await _read(request, "native_stream"))


async def invocations(request: Request) -> Response:
    """For SageMaker: takes `inputs` as `/` does, `messages` as a chat, `prompt` as a completion."""
    record_of(request).generates = True
    read = await read_requests(request, "invocations")
    if isinstance(read.body, ChatBody):
        return await chat(request, read, state_of(request))
    if isinstance(read.body, CompletionBody):
        return await complete(request, read, state_of(request))
    return await _stream(request, read) if native(read).stream else await _whole(request, read, as_list=True)


async def _read(request: Request, kind: Kind) -> Read:
    record_of(request).generates = True
    return await read_requests(request, kind)


async def _addressed(request: Request, read: Read) -> tuple[GenerateRequest, AdapterRef | None]:
    """The request with its adapter, id and salt, and the adapter."""
    state, body = state_of(request), native(read)
    adapter = await answering(body, state)
    (made,) = read.requests
    mark(request, adapter, made.params.max_tokens)
    salt = prefix_salt(request, body.params.cache_salt, state.config.salt_by_api_key)
    return replace(made, adapter=adapter, request_id=record_of(request).request_id, salt=salt), adapter


def native(read: Read) -> GenerateBody:
    assert isinstance(read.body, GenerateBody)
    return read.body


async def _whole(request: Request, read: Read, *, as_list: bool) -> Response:
    started = time.monotonic()
    body = native(read)
    made, adapter = await _addressed(request, read)

    def answer(found: list[Completion]) -> Response:
        choice, *others = best_first(found[0].choices)
        full = body.inputs if body.params.return_full_text else ""
        reply: dict[str, Any] = {"generated_text": full + choice.text}
        if body.params.wants_details:
            reply["details"] = details(choice, others, found[0].prompt, body)
        headers = reply_headers(
            len(body.inputs),
            adapter,
            record_of(request),
            state_of(request),
            total_s=time.monotonic() - started,
            completion_tokens=choice.totals.completion_tokens,
        )
        return json_reply([reply] if as_list else reply, headers=headers)

    return await whole(request, [made], answer)


async def _stream(request: Request, read: Read) -> Response:
    body = native(read)
    made, adapter = await _addressed(request, read)
    return await stream(
        request, [made], NativeWriter(body), stream_headers(len(body.inputs), adapter, state_of(request))
    )

"""LoRAX's and TGI's routes: ``/``, ``/generate``, ``/generate_stream``, ``/invocations``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.server.generating import stream, whole
from truffula.server.headers import reply_headers, stream_headers
from truffula.server.lorax_bodies import GenerateBody
from truffula.server.lorax_parts import NativeWriter, best_first, details
from truffula.server.openai_bodies import ChatBody, CompletionBody
from truffula.server.openai_chat import chat
from truffula.server.openai_completions import complete
from truffula.server.prepare import Read, read_requests
from truffula.server.replies import json_reply
from truffula.types import Completion


async def compatible(request: Request) -> Response:
    """Continues a text. The answer is a list with one object, or events with `stream: true`."""
    return await _list_or_stream(request, await read_requests(request, "native"))


async def generate(request: Request) -> Response:
    """Continues a text. The answer is one object; `stream` has no effect."""
    return await _whole(request, await read_requests(request, "native_whole"), as_list=False)


async def generate_stream(request: Request) -> Response:
    """Continues a text. The answer is server-sent events, one for each token."""
    return await _stream(request, await read_requests(request, "native_stream"))


async def invocations(request: Request) -> Response:
    """For SageMaker: takes `inputs` as `/` does, `messages` as a chat, `prompt` as a completion."""
    read = await read_requests(request, "invocations")
    if isinstance(read.body, ChatBody):
        return await chat(request, read)
    if isinstance(read.body, CompletionBody):
        return await complete(request, read)
    return await _list_or_stream(request, read)


async def _list_or_stream(request: Request, read: Read) -> Response:
    return await _stream(request, read) if _body(read).stream else await _whole(request, read, as_list=True)


def _body(read: Read) -> GenerateBody:
    assert isinstance(read.body, GenerateBody)
    return read.body


async def _whole(request: Request, read: Read, *, as_list: bool) -> Response:
    body = _body(read)

    def answer(found: list[Completion]) -> Response:
        choice, *others = best_first(found[0].choices)
        full = body.inputs if body.params.return_full_text else ""
        reply: dict[str, Any] = {"generated_text": full + choice.text}
        if body.params.wants_details:
            reply["details"] = details(choice, others, found[0].prompt, body)
        headers = reply_headers(request, read, choice.totals.completion_tokens)
        return json_reply([reply] if as_list else reply, headers=headers)

    return await whole(request, read.requests, answer)


async def _stream(request: Request, read: Read) -> Response:
    return await stream(request, read.requests, NativeWriter(_body(read)), stream_headers(request, read))

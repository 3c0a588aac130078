"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.server.generating import stream, whole
from truffula.server.openai_bodies import ChatBody
from truffula.server.openai_parts import (
    OpenAIWriter,
    chat_logprobs,
    head,
    prompt_ids,
    prompt_logprobs,
    shown,
    stop_reason,
    usage_of,
)
from truffula.server.prepare import Read, read_requests
from truffula.server.replies import encoded, json_reply
from truffula.types import Completion, CompletionChoice, TextDelta


async def chat_completions(request: Request) -> Response:
    """Answers a conversation with its next message."""
    return await chat(request, await read_requests(request, "chat"))


async def chat(request: Request, read: Read) -> Response:
    body = read.body
    assert isinstance(body, ChatBody)
    if body.stream:
        return await stream(request, read.requests, ChatWriter(request, body))
    reply = head("chat.completion", "chatcmpl", body, request)
    return await whole(request, read.requests, lambda found: _reply(body, reply, found[0]))


def _reply(body: ChatBody, reply: dict[str, Any], found: Completion) -> Response:
    reply["choices"] = [encoded(_choice(body, choice)) for choice in found.choices]
    reply["usage"] = usage_of([found])
    if body.prompt_logprobs is not None:
        reply["prompt_logprobs"] = encoded(prompt_logprobs(found.prompt))
    if body.return_token_ids:
        reply["prompt_token_ids"] = prompt_ids(found.prompt)
    return json_reply(reply)


def _choice(body: ChatBody, choice: CompletionChoice) -> dict[str, Any]:
    out: dict[str, Any] = {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": None,
        "finish_reason": choice.finish_reason,
        "stop_reason": stop_reason(choice),
    }
    if body.logprobs:
        out["logprobs"] = chat_logprobs(shown(choice.tokens), bool(body.return_tokens_as_token_ids))
    if body.return_token_ids:
        out["token_ids"] = choice.token_ids
    return out


class ChatWriter(OpenAIWriter):
    """Chunks of a streamed chat. The role comes once per choice: accumulators concatenate strings.

    Only text-generation's client, which always names its model ``tgi``, needs ``role`` and ``tool_calls`` in every
    delta.
    """

    def __init__(self, request: Request, body: ChatBody) -> None:
        super().__init__(request, body, head("chat.completion.chunk", "chatcmpl", body, request))
        self._body = body

    def begin(self) -> bytes:
        start = {"role": "assistant", "content": ""}
        return b"".join(self._choice_chunk({"index": i, "delta": start}) for i in range(self._body.n or 1))

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        body = self._body
        self.count(prompt, delta)
        pieces = shown(delta.tokens)
        out = b""
        if delta.text or (pieces and body.logprobs) or (body.return_token_ids and (delta.tokens or delta.prompt)):
            choice: dict[str, Any] = {"index": delta.choice, "delta": {"content": delta.text}}
            if body.logprobs:
                choice["logprobs"] = chat_logprobs(pieces, bool(body.return_tokens_as_token_ids))
            if body.return_token_ids:
                choice["token_ids"] = [piece.id for piece in delta.tokens]
            more = {"prompt_token_ids": prompt_ids(delta.prompt)} if body.return_token_ids and delta.prompt else {}
            out = self._choice_chunk(choice, **more)
        if delta.finish_reason is None:
            return out
        ended = {"finish_reason": delta.finish_reason, "stop_reason": stop_reason(delta)}
        return out + self._choice_chunk({"index": delta.choice, "delta": {}, **ended})

    def _choice_chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        if self._body.model == "tgi":
            choice["delta"] = {"role": "assistant", "content": "", "tool_calls": None} | choice["delta"]
        choice.setdefault("logprobs", None)
        choice.setdefault("finish_reason", None)
        return self.chunk(choice, **more)

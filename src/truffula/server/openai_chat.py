"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import TruffulaError
from truffula.server.errors import error_body
from truffula.server.generating import stream, whole
from truffula.server.openai_bodies import ChatBody
from truffula.server.openai_parts import (
    UsageCount,
    asked_model,
    chat_logprobs,
    head,
    prompt_ids,
    prompt_logprobs,
    shown,
    usage_of,
)
from truffula.server.openai_requests import addressed
from truffula.server.prepare import Read, read_requests
from truffula.server.replies import encoded, json_reply
from truffula.server.sse import DONE, frame
from truffula.server.state import ServerState, record_of, state_of
from truffula.types import Completion, CompletionChoice, TextDelta


async def chat_completions(request: Request) -> Response:
    """Answers a conversation with its next message."""
    state = state_of(request)
    record_of(request).generates = True
    return await chat(request, await read_requests(request, "chat"), state)


async def chat(request: Request, read: Read, state: ServerState) -> Response:
    body = read.body
    assert isinstance(body, ChatBody)
    (one,) = await addressed(request, body, read.requests, state)
    model = asked_model(body, state)
    if body.stream:
        return await stream(
            request, [one], ChatWriter(request, body, head("chat.completion.chunk", "chatcmpl", model, state))
        )
    reply = head("chat.completion", "chatcmpl", model, state)
    return await whole(request, [one], lambda found: _reply(body, reply, found[0]))


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
        "stop_reason": None if choice.eos else choice.stop_reason,
    }
    if body.logprobs:
        out["logprobs"] = chat_logprobs(shown(choice.tokens), bool(body.return_tokens_as_token_ids))
    if body.return_token_ids:
        out["token_ids"] = choice.token_ids
    return out


class ChatWriter:
    """Chunks of a streamed chat. The role comes once per choice: accumulators concatenate strings.

    Only text-generation's client, which always names its model ``tgi``, needs ``role`` and ``tool_calls`` in every
    delta.
    """

    def __init__(self, request: Request, body: ChatBody, top: dict[str, Any]) -> None:
        self._body = body
        self._top = top
        self._usage = UsageCount(record_of(request))
        self._tgi = body.model == "tgi"
        self._continuous = bool(
            body.include_usage and body.stream_options and body.stream_options.continuous_usage_stats
        )

    def begin(self) -> bytes:
        return b"".join(
            self._chunk({"index": i, "delta": {"role": "assistant", "content": ""}}) for i in range(self._body.n or 1)
        )

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        body = self._body
        self._usage.note(prompt, delta)
        pieces = shown(delta.tokens)
        out = b""
        if delta.text or (pieces and body.logprobs) or (body.return_token_ids and (delta.tokens or delta.prompt)):
            choice: dict[str, Any] = {"index": delta.choice, "delta": {"content": delta.text}}
            if body.logprobs:
                choice["logprobs"] = chat_logprobs(pieces, bool(body.return_tokens_as_token_ids))
            if body.return_token_ids:
                choice["token_ids"] = [piece.id for piece in delta.tokens]
            out = self._chunk(choice, prompt_ids(delta.prompt) if body.return_token_ids and delta.prompt else None)
        if delta.finish_reason is None:
            return out
        reason = None if delta.eos else delta.stop_reason
        last = {"index": delta.choice, "delta": {}, "finish_reason": delta.finish_reason, "stop_reason": reason}
        return out + self._chunk(last)

    def _chunk(self, choice: dict[str, Any], ids: list[int] | None = None) -> bytes:
        choice.setdefault("logprobs", None)
        choice.setdefault("finish_reason", None)
        if self._tgi:
            choice["delta"] = {"role": "assistant", "content": "", "tool_calls": None} | choice["delta"]
        chunk = {**self._top, "choices": [choice]}
        if ids is not None:
            chunk["prompt_token_ids"] = ids
        if self._body.include_usage:
            chunk["usage"] = self._usage.value() if self._continuous else None
        return frame(chunk)

    def fail(self, error: TruffulaError) -> bytes:
        return frame(error_body(error, "openai")) + DONE

    def end(self) -> bytes:
        if not self._body.include_usage:
            return DONE
        return frame({**self._top, "choices": [], "usage": self._usage.value()}) + DONE

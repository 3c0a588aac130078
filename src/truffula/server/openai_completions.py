"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.server.generating import stream, whole
from truffula.server.headers import reply_headers
from truffula.server.openai_bodies import CompletionBody
from truffula.server.openai_parts import (
    CompletionLogprobs,
    OpenAIWriter,
    head,
    prompt_ids,
    prompt_logprobs,
    shown,
    stop_reason,
    usage_of,
)
from truffula.server.prepare import Read, read_requests
from truffula.server.replies import encoded, json_reply
from truffula.types import Completion, CompletionChoice, TextDelta, TokenPiece


async def completions(request: Request) -> Response:
    """Continues a prompt, or several: text or token ids."""
    return await complete(request, await read_requests(request, "completion"))


async def complete(request: Request, read: Read) -> Response:
    body = read.body
    assert isinstance(body, CompletionBody)
    top = head("text_completion", "cmpl", body, request)
    if body.stream:
        return await stream(request, read.requests, CompletionWriter(request, body, top))

    def reply(found: list[Completion]) -> Response:
        choices = [encoded(_choice(body, i, one, choice)) for i, one in enumerate(found) for choice in one.choices]
        headers = reply_headers(request, read, sum(one.completion_tokens for one in found))
        return json_reply({**top, "choices": choices, "usage": usage_of(found)}, headers=headers)

    return await whole(request, read.requests, reply)


def _choice(body: CompletionBody, prompt: int, found: Completion, choice: CompletionChoice) -> dict[str, Any]:
    given = found.prompt if body.echo else None
    logprobs = None
    if body.logprobs is not None:
        pieces = [*(given.tokens if given else ()), *shown(choice.tokens)]
        logprobs = CompletionLogprobs(bool(body.return_tokens_as_token_ids)).of(pieces)
    out: dict[str, Any] = {
        "index": prompt * (body.n or 1) + choice.index,
        "text": (given.text if given else "") + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": stop_reason(choice),
    }
    if body.prompt_logprobs is not None:
        out["prompt_logprobs"] = prompt_logprobs(found.prompt)
    if body.return_token_ids:
        out["prompt_token_ids"] = prompt_ids(found.prompt)
        out["token_ids"] = choice.token_ids
    return out


class CompletionWriter(OpenAIWriter):
    """Chunks of a streamed completion; choices interleave and are identified by their index."""

    def __init__(self, request: Request, body: CompletionBody, top: dict[str, Any]) -> None:
        super().__init__(request, body, top)
        self._body = body
        self._logprobs: dict[tuple[int, int], CompletionLogprobs] = {}

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        body = self._body
        self.count(prompt, delta)
        given = delta.prompt if body.echo else None
        text = (given.text if given else "") + delta.text
        pieces = [*(given.tokens if given else ()), *shown(delta.tokens)]
        if not text and not pieces and delta.finish_reason is None and not body.return_token_ids:
            return b""
        choice: dict[str, Any] = {
            "index": prompt * (body.n or 1) + delta.choice,
            "text": text,
            "logprobs": self._logprobs_of(prompt, delta.choice, pieces),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = stop_reason(delta)
        if body.return_token_ids:
            choice["token_ids"] = [piece.id for piece in delta.tokens]
            if delta.prompt is not None:
                choice["prompt_token_ids"] = prompt_ids(delta.prompt)
        return self.chunk(choice)

    def _logprobs_of(self, prompt: int, choice: int, pieces: list[TokenPiece]) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        found = self._logprobs.get((prompt, choice))
        if found is None:
            found = self._logprobs[prompt, choice] = CompletionLogprobs(bool(self._body.return_tokens_as_token_ids))
        return found.of(pieces)

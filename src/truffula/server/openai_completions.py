"""``POST /v1/completions``."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import TruffulaError
from truffula.server.errors import error_body
from truffula.server.generating import stream, whole
from truffula.server.headers import reply_headers
from truffula.server.openai_bodies import CompletionBody
from truffula.server.openai_parts import (
    CompletionLogprobs,
    UsageCount,
    asked_model,
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
from truffula.types import Completion, CompletionChoice, PromptPart, TextDelta, TokenPiece


async def completions(request: Request) -> Response:
    """Continues a prompt, or several: text or token ids."""
    state = state_of(request)
    record_of(request).generates = True
    return await complete(request, await read_requests(request, "completion"), state)


async def complete(request: Request, read: Read, state: ServerState) -> Response:
    started = time.monotonic()
    body = read.body
    assert isinstance(body, CompletionBody)
    requests = await addressed(request, body, read.requests, state)
    top = head("text_completion", "cmpl", asked_model(body, state), state)
    if body.stream:
        return await stream(request, requests, CompletionWriter(request, body, top))

    def reply(found: list[Completion]) -> Response:
        choices = [encoded(_choice(body, i, one, choice)) for i, one in enumerate(found) for choice in one.choices]
        headers = reply_headers(
            read.characters,
            requests[0].adapter,
            record_of(request),
            state,
            total_s=time.monotonic() - started,
            completion_tokens=sum(one.completion_tokens for one in found),
        )
        return json_reply({**top, "choices": choices, "usage": usage_of(found)}, headers=headers)

    return await whole(request, requests, reply)


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
        "stop_reason": None if choice.eos else choice.stop_reason,
    }
    if body.prompt_logprobs is not None:
        out["prompt_logprobs"] = prompt_logprobs(found.prompt)
    if body.return_token_ids:
        out["prompt_token_ids"] = prompt_ids(found.prompt)
        out["token_ids"] = choice.token_ids
    return out


class CompletionWriter:
    """Chunks of a streamed completion; choices interleave and are identified by their index."""

    def __init__(self, request: Request, body: CompletionBody, top: dict[str, Any]) -> None:
        self._body = body
        self._top = top
        self._usage = UsageCount(record_of(request))
        self._logprobs: dict[tuple[int, int], CompletionLogprobs] = {}
        self._continuous = bool(
            body.include_usage and body.stream_options and body.stream_options.continuous_usage_stats
        )

    def begin(self) -> bytes:
        return b""

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        body = self._body
        self._usage.note(prompt, delta)
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
            choice["stop_reason"] = None if delta.eos else delta.stop_reason
        if body.return_token_ids:
            self._add_ids(choice, delta.prompt, delta)
        return self._chunk([choice])

    def _logprobs_of(self, prompt: int, choice: int, pieces: list[TokenPiece]) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        found = self._logprobs.get((prompt, choice))
        if found is None:
            found = self._logprobs[prompt, choice] = CompletionLogprobs(bool(self._body.return_tokens_as_token_ids))
        return found.of(pieces)

    @staticmethod
    def _add_ids(choice: dict[str, Any], prompt: PromptPart | None, delta: TextDelta) -> None:
        choice["token_ids"] = [piece.id for piece in delta.tokens]
        if prompt is not None:
            choice["prompt_token_ids"] = prompt_ids(prompt)

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        chunk = {**self._top, "choices": choices}
        if self._body.include_usage:
            chunk["usage"] = self._usage.value() if self._continuous else None
        return frame(chunk)

    def fail(self, error: TruffulaError) -> bytes:
        return frame(error_body(error, "openai")) + DONE

    def end(self) -> bytes:
        if not self._body.include_usage:
            return DONE
        return frame({**self._top, "choices": [], "usage": self._usage.value()}) + DONE

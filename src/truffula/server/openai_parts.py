"""Pieces of OpenAI's answers that both routes share: heads, usage, logprobs of either form."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from truffula import __version__
from truffula.metrics import RequestRecord
from truffula.server.openai_bodies import OpenAIBody
from truffula.server.state import ServerState
from truffula.types import Completion, PromptPart, TextDelta, TokenPiece

LEAST_LOGPROB = -9999.0  # JSON has no infinity, and clients refuse null here


def head(kind: str, prefix: str, model: str, state: ServerState) -> dict[str, Any]:
    """What all chunks of one answer share."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"truffula-{__version__}-{state.service.info.dtype}",
    }


def asked_model(body: OpenAIBody, state: ServerState) -> str:
    """The name in the answer: the one asked for, the base's where none was."""
    return body.model or state.model_id


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def usage_of(completions: Sequence[Completion]) -> dict[str, Any]:
    """Each prompt counts once, every choice's tokens count."""
    return usage(
        sum(c.prompt_tokens for c in completions),
        sum(c.completion_tokens for c in completions),
        sum(c.cached_tokens for c in completions),
    )


class UsageCount:
    """Usage while a stream runs. ``record`` knows the prompt tokens from the start."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._cached: dict[int, int] = {}
        self._completion: dict[tuple[int, int], int] = {}

    def note(self, prompt: int, delta: TextDelta) -> None:
        key = (prompt, delta.choice)
        if delta.totals is None:
            self._completion[key] = self._completion.get(key, 0) + len(delta.tokens)
            return
        self._completion[key] = delta.totals.completion_tokens
        self._cached[prompt] = delta.totals.cached_tokens

    def value(self) -> dict[str, Any]:
        return usage(self._record.prompt_tokens, sum(self._completion.values()), sum(self._cached.values()))


def finite(logprob: float | None) -> float:
    """A logprob as every client can read it."""
    return LEAST_LOGPROB if logprob is None or not logprob > LEAST_LOGPROB else logprob


def token_name(token: int, text: str, as_ids: bool) -> str:
    return f"token_id:{token}" if as_ids else text


class CompletionLogprobs:
    """``/v1/completions``' four lists. ``text_offset`` counts characters from the start of the choice's text."""

    def __init__(self, as_ids: bool) -> None:
        self._as_ids = as_ids
        self._offset = 0

    def of(self, pieces: Iterable[TokenPiece]) -> dict[str, Any]:
        """The lists of ``pieces``, which follow those of earlier calls. A first prompt token has no logprob."""
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for piece in pieces:
            name = token_name(piece.id, piece.text, self._as_ids)
            tokens.append(name)
            offsets.append(self._offset)
            self._offset += len(piece.text)
            logprobs.append(None if piece.logprob is None else finite(piece.logprob))
            if piece.logprob is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token, text, logprob in piece.top:
                top.setdefault(token_name(token, text, self._as_ids), finite(logprob))
            top[name] = finite(piece.logprob)  # under its own name whatever else is spelled alike
            tops.append(top)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def chat_logprobs(pieces: Iterable[TokenPiece], as_ids: bool) -> dict[str, Any]:
    """``/v1/chat/completions``' form: one entry per shown token."""
    content = []
    for piece in pieces:
        entry = _chat_token(piece.id, piece.text, piece.logprob, as_ids)
        entry["top_logprobs"] = [
            _chat_token(token, piece.text if token == piece.id else text, logprob, as_ids)
            for token, text, logprob in piece.top
        ]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_token(token: int, text: str, logprob: float | None, as_ids: bool) -> dict[str, Any]:
    return {"token": token_name(token, text, as_ids), "logprob": finite(logprob), "bytes": list(text.encode())}


def shown(pieces: Iterable[TokenPiece]) -> list[TokenPiece]:
    return [piece for piece in pieces if piece.shown]


def prompt_logprobs(prompt: PromptPart | None) -> list[dict[str, Any] | None]:
    """vLLM's extra: per prompt token the chosen id and the most likely ones, by id; the first has none."""
    rows: list[dict[str, Any] | None] = []
    for piece in prompt.tokens if prompt is not None else ():
        if piece.logprob is None:
            rows.append(None)
            continue
        row: dict[str, Any] = {}
        for rank, (token, text, logprob) in enumerate(piece.top, 1):
            row[str(token)] = {"logprob": finite(logprob), "rank": rank, "decoded_token": text}
        row.setdefault(str(piece.id), {"logprob": finite(piece.logprob), "rank": None, "decoded_token": piece.text})
        rows.append(row)
    return rows


def prompt_ids(prompt: PromptPart | None) -> list[int]:
    return [] if prompt is None else [piece.id for piece in prompt.tokens]

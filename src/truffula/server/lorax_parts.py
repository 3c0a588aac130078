"""LoRAX's and TGI's response objects: tokens, details, stream events. Both spellings where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from truffula.errors import TruffulaError
from truffula.server.errors import error_body
from truffula.server.lorax_bodies import GenerateBody, Parameters
from truffula.server.openai_parts import finite
from truffula.server.replies import encoded
from truffula.server.sse import frame
from truffula.types import ChoiceTotals, CompletionChoice, PromptPart, TextDelta, TokenPiece


def finish_reason(reason: str | None, eos: bool) -> str:
    """One of the three words clients know; the true reason, also on the last allowed token."""
    if reason == "length":
        return "length"
    return "eos_token" if eos else "stop_sequence"


def token(piece: TokenPiece, params: Parameters) -> dict[str, Any]:
    """One generated token. A logprob is always a finite number: clients reject null."""
    out: dict[str, Any] = {
        "id": piece.id,
        "text": piece.text,
        "logprob": finite(piece.logprob),
        "special": piece.special,
        "skipped": False,
    }
    if params.return_k_alternatives:
        out["alternative_tokens"] = _alternatives(piece, params.return_k_alternatives)
    return out


def _alternatives(piece: TokenPiece, count: int) -> list[dict[str, Any]]:
    return [{"id": top.id, "text": top.text, "logprob": finite(top.logprob)} for top in piece.top[:count]]


def top_tokens(piece: TokenPiece, count: int) -> list[dict[str, Any]]:
    """TGI's spelling of the alternatives."""
    return [{**alternative, "special": False} for alternative in _alternatives(piece, count)]


def prefill(prompt: PromptPart | None, params: Parameters) -> list[dict[str, Any]]:
    """The prompt's tokens; the first has no logprob. Empty unless asked for."""
    if prompt is None or not params.decoder_input_details:
        return []
    return [
        {"id": p.id, "text": p.text, "logprob": None if p.logprob is None else finite(p.logprob)} for p in prompt.tokens
    ]


def _sequence(choice: CompletionChoice, prompt: PromptPart | None, params: Parameters) -> dict[str, Any]:
    out: dict[str, Any] = {
        "finish_reason": finish_reason(choice.finish_reason, choice.eos),
        "generated_tokens": choice.totals.completion_tokens,
        "seed": choice.totals.seed,
        "prefill": prefill(prompt, params),
        "tokens": [token(piece, params) for piece in choice.tokens],
    }
    if params.top_n_tokens:
        out["top_tokens"] = [top_tokens(piece, params.top_n_tokens) for piece in choice.tokens]
    return out


def details(
    choice: CompletionChoice,
    others: Sequence[CompletionChoice],
    prompt: PromptPart | None,
    body: GenerateBody,
) -> dict[str, Any]:
    """``details`` of a whole answer; ``others`` are the choices ``best_of`` did not take."""
    params = body.params
    out = _sequence(choice, prompt, params)
    out["prompt_tokens"] = out["input_length"] = choice.totals.prompt_tokens
    out["skipped_tokens"] = 0
    if others:
        full = body.inputs if params.return_full_text else ""
        out["best_of_sequences"] = [
            encoded({"generated_text": full + other.text, **_sequence(other, prompt, params)}) for other in others
        ]
    return out


def best_first(choices: Sequence[CompletionChoice]) -> list[CompletionChoice]:
    """The winner of ``best_of`` in front: the highest mean logprob, the earlier of equals."""
    return sorted(choices, key=lambda c: -_mean(c))


def _mean(choice: CompletionChoice) -> float:
    if choice.totals.mean_logprob is not None:
        return choice.totals.mean_logprob
    values = [finite(piece.logprob) for piece in choice.tokens]
    return sum(values) / max(1, len(values))


class NativeWriter:
    """One event a token, EOS included; the summary rides on the last. Never ``[DONE]``: clients would parse it."""

    def __init__(self, body: GenerateBody) -> None:
        self._body = body
        self._params = body.params
        self._text: list[str] = []
        self._count = 0

    def begin(self) -> bytes:
        return b""

    def delta(self, prompt: int, delta: TextDelta) -> bytes:
        self._text.append(delta.text)
        pieces = list(delta.tokens)
        if delta.finish_reason is not None and not pieces:
            pieces = [TokenPiece(0, "", None, special=True)]  # nothing was generated; clients still need an event
        last = len(pieces) - 1 if delta.finish_reason is not None else -1
        return b"".join(self._event(piece, delta if i == last else None) for i, piece in enumerate(pieces))

    def _event(self, piece: TokenPiece, last: TextDelta | None) -> bytes:
        self._count += 1
        event: dict[str, Any] = {
            "index": self._count,
            "token": token(piece, self._params),
            "generated_text": None,
            "details": None,
        }
        if self._params.top_n_tokens:
            event["top_tokens"] = top_tokens(piece, self._params.top_n_tokens)
        if last is not None:
            full = self._body.inputs if self._params.return_full_text else ""
            event["generated_text"] = full + "".join(self._text)
            if self._params.wants_details:
                event["details"] = self._summary(last, last.totals or ChoiceTotals())
        return frame(event)

    @staticmethod
    def _summary(last: TextDelta, totals: ChoiceTotals) -> dict[str, Any]:
        return {
            "finish_reason": finish_reason(last.finish_reason, last.eos),
            "prompt_tokens": totals.prompt_tokens,
            "input_length": totals.prompt_tokens,
            "generated_tokens": totals.completion_tokens,
            "skipped_tokens": 0,
            "seed": totals.seed,
        }

    def fail(self, error: TruffulaError) -> bytes:
        return frame(error_body(error, "native"))

    def end(self) -> bytes:
        return b""

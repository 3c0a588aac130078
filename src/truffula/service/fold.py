"""A JSON reply is the fold of the same deltas that a stream shows."""

from __future__ import annotations

from collections.abc import Iterable

from truffula.errors import TruffulaError
from truffula.service.choices import merged
from truffula.types import ChoiceTotals, Completion, CompletionChoice, TextDelta


def collect(deltas: Iterable[TextDelta]) -> Completion:
    """Every delta of one request, in order (choices may interleave), as one answer. Each choice must have ended."""
    parts: dict[int, list[TextDelta]] = {}
    for delta in deltas:
        parts.setdefault(delta.choice, []).append(delta)
    whole = [merged(parts[index], index) for index in sorted(parts)]
    choices = []
    for one in whole:
        assert one.finish_reason is not None, "a choice is folded before its end"
        choices.append(
            CompletionChoice(
                index=one.choice,
                text=one.text,
                tokens=one.tokens,
                finish_reason=one.finish_reason,
                stop_reason=one.stop_reason,
                eos=one.eos,
                error=one.error,
                totals=one.totals or ChoiceTotals(),
            )
        )
    return Completion(
        choices=choices,
        prompt=next((one.prompt for one in whole if one.prompt is not None), None),
        prompt_tokens=max((choice.totals.prompt_tokens for choice in choices), default=0),
        completion_tokens=sum(choice.totals.completion_tokens for choice in choices),
        cached_tokens=max((choice.totals.cached_tokens for choice in choices), default=0),
    )


def choice_error(delta: TextDelta) -> TruffulaError | None:
    """The error that ended a choice; None while it is generated and after any other end."""
    return TruffulaError.from_info(delta.error) if delta.finish_reason == "error" else None

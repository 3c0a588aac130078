"""One choice of a request: token events in, text out. A pure state machine, one per sequence of the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from truffula.errors import ErrorInfo, TruffulaError
from truffula.items import Item, Part, Reasoning, Text, ToolCall, ToolCallPart
from truffula.params import SamplingParams
from truffula.service.prompts import Prompt, prompt_part, top_pieces
from truffula.text.stops import StopMatch, StopMatcher
from truffula.text.tokenizer import Tokenizer
from truffula.types import (
    ChoiceTotals,
    Completion,
    CompletionChoice,
    EngineRequest,
    FinishReason,
    PromptPart,
    RequestTimes,
    TextDelta,
    TokenEvent,
    TokenPiece,
    TopToken,
)


class Parser(Protocol):
    """Of the text of one answer; ``text/output_parser.py`` has the one of the server."""

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


class ChoiceState:
    """Turns the events of one ``EngineRequest`` into deltas.

    Tokens are released whole, as soon as no text of theirs could still become part of a stop string and no character of
    theirs is unfinished. So in every delta the shown pieces join to the text, and text that a stop string removes was
    never sent.

    Stop strings are looked for in the text with special tokens, as LoRAX and TGI do, whether or not special tokens are
    shown. A token that ends the completion by its id is not part of that text: the id is the reason.

    With a parser the parts of a delta are the parser's. It reads the same text up to the stop string, and may hold back
    more than the tokens that a delta brings.

    Args:
        request: As submitted.
        params: As asked for (with ``stop``; ``logprobs`` None where the engine is only asked for them to rank).
        echoed: The prompt, when the client asked for it.
        parser: Of tool calls and reasoning; None: the text is the only part.
    """

    def __init__(
        self,
        request: EngineRequest,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        echoed: Prompt | None = None,
        clock: Callable[[], float] = time.monotonic,
        parser: Parser | None = None,
    ) -> None:
        self._request = request
        self._params = params
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._echoed = echoed
        self._clock = clock
        self._detokenizer = tokenizer.detokenizer() if tokenizer is not None else None
        self._skipped = tokenizer.special_ids if tokenizer is not None and params.skip_special_tokens else frozenset()
        self._special = tokenizer.special_ids if tokenizer is not None else frozenset()
        self._stops = StopMatcher(params.stop) if params.stop else None
        self._parser = parser
        self._unparsed = 0  # released tokens of which the parser has returned nothing yet
        self._reasoning_tokens = 0
        # Decodes the text that stop strings are looked for in and that is parsed, where it is not the text shown.
        reads_full = tokenizer is not None and self._skipped and (self._stops or parser)
        self._full = tokenizer.detokenizer() if tokenizer is not None and reads_full else None
        self._unmatched = 0  # characters before min_tokens, which the matcher has not seen
        self._held: list[TokenPiece] = []
        self._fulls: list[str] = []  # per held piece: its part of the text that stop strings are looked for in
        self._held_start = 0  # where the held pieces begin in that text
        self._unfinished = 0  # trailing tokens that hold the beginning of a character
        self._count = 0
        self._logprob_sum = 0.0
        self._logprob_count = 0
        self._prompt_tokens = len(request.prompt_ids)
        self._cached = 0
        self._times: RequestTimes | None = None
        self.finished = False

    def push(self, event: TokenEvent) -> TextDelta | None:
        """What ``event`` lets out; None when it is nothing yet. After the terminal delta events are ignored.

        A terminal delta that answers an event without ``finish_reason`` means a stop string: the engine must be told to
        end.
        """
        if self.finished:
            return None
        prompt = self._prompt(event)
        self._cached = event.cached_tokens or self._cached
        self._times = event.times or self._times
        ends_by_id = event.finish_reason == "stop" and event.stop_reason is not None
        last = len(event.token_ids) - 1
        for index, token_id in enumerate(event.token_ids):
            match = self._take(token_id, index, event, ended=ends_by_id and index == last)
            if match is not None:
                self._cut(match)
                return self._end("stop", prompt, stop_reason=match.stop)
        if event.finish_reason is not None:
            return self._finish(event, prompt)
        released, parts = self._release()
        if not released and prompt is None:
            return None
        return TextDelta(choice=self._request.choice, parts=parts, tokens=released, prompt=prompt)

    def _prompt(self, event: TokenEvent) -> PromptPart | None:
        if self._echoed is None or event.finish_reason in ("error", "abort"):
            return None
        found = prompt_part(self._echoed, event.prompt_logprobs, self._tokenizer)
        self._echoed = None
        return found

    def _take(self, token_id: int, index: int, event: TokenEvent, *, ended: bool) -> StopMatch | None:
        """One token to the held pieces; the stop string that it completes."""
        self._count += 1
        logprob: float | None = None
        top: list[TopToken] = []
        if event.logprobs:
            logprob = event.logprobs[index]
            self._logprob_sum += logprob
            self._logprob_count += 1
            if self._params.logprobs is None:
                logprob = None
            elif event.top_logprobs:
                top = top_pieces(event.top_logprobs[index], self._tokenizer)
        hidden = token_id in self._skipped or (ended and not self._params.include_stop)
        text = self._text(token_id, hidden)
        full = ""
        if not ended or (self._parser is not None and not hidden):
            full = text if self._full is None else self._full.push(token_id)
        pending = self._detokenizer is not None and self._detokenizer.pending
        pending = pending or (self._full is not None and self._full.pending)
        self._unfinished = self._unfinished + 1 if pending else 0
        raw = None if self._params.logprobs is None else self._raw(token_id, text)
        self._held.append(TokenPiece(token_id, text, logprob, token_id in self._special, not hidden, top, raw))
        self._fulls.append(full)
        return None if ended or self._stops is None else self._match(full)

    def _text(self, token_id: int, hidden: bool) -> str:
        """What a shown token adds to the text; the own text of a hidden one."""
        if self._tokenizer is None or self._detokenizer is None:
            return ""
        return self._tokenizer.text_of(token_id) if hidden else self._detokenizer.push(token_id)

    def _raw(self, token_id: int, text: str) -> bytes | None:
        if self._params.logprobs is None or self._tokenizer is None:
            return None
        return self._tokenizer.bytes_added(token_id, text)

    def _match(self, text: str) -> StopMatch | None:
        if self._stops is None or not text:
            return None
        if self._count < self._params.min_tokens:
            self._unmatched += len(text)
            return None
        return self._stops.feed(text)

    def _release(self, everything: bool = False) -> tuple[list[TokenPiece], list[Part]]:
        """Take from the held pieces those that are safe to show, and the parts that they make."""
        held = self._held
        holding = 0 if self._stops is None or self._params.include_stop else self._stops.holding
        keep = 0 if everything else self._unfinished
        if everything or not (holding or keep):
            released, fulls = held, self._fulls
            self._held, self._fulls = [], []
        else:
            chars = sum(map(len, self._fulls[len(held) - keep :]))
            while chars < holding:
                keep += 1
                chars += len(self._fulls[-keep])
            cut = len(held) - keep
            released, fulls = held[:cut], self._fulls[:cut]
            self._held, self._fulls = held[cut:], self._fulls[cut:]
        if self._stops is not None:
            self._held_start += sum(map(len, fulls))
        return released, self._parsed(fulls, everything) if self._parser is not None else _parts(released)

    def _parsed(self, texts: Sequence[str], everything: bool) -> list[Part]:
        """The parser's parts of the next tokens. A token counts as reasoning if the next part after it is reasoning."""
        assert self._parser is not None
        steps = [(1, self._parser.feed(text)) for text in texts]
        if everything:
            steps.append((0, self._parser.finish()))
        for tokens, parts in steps:
            self._unparsed += tokens
            if parts:
                self._reasoning_tokens += self._unparsed if isinstance(parts[0], Reasoning) else 0
                self._unparsed = 0
        return merged_parts(part for _, parts in steps for part in parts)

    def _finish(self, event: TokenEvent, prompt: PromptPart | None) -> TextDelta:
        """The engine's own end: text that was held back is text after all."""
        rest = self._detokenizer.flush() if self._detokenizer is not None else ""
        full = self._full.flush() if self._full is not None else rest
        if rest or full:
            at = max((i for i, piece in enumerate(self._held) if piece.shown), default=len(self._held) - 1)
            piece = self._held[at]
            text = piece.text + rest
            self._held[at] = msgspec.structs.replace(piece, text=text, raw=self._raw(piece.id, text))
            self._fulls[at] += full
            match = self._match(full)
            if match is not None:
                self._cut(match)
                return self._end("stop", prompt, stop_reason=match.stop)
        assert event.finish_reason is not None
        eos = event.stop_reason in self._eos_ids
        return self._end(
            event.finish_reason, prompt, stop_reason=None if eos else event.stop_reason, eos=eos, error=event.error
        )

    def _end(
        self,
        reason: FinishReason,
        prompt: PromptPart | None,
        *,
        stop_reason: str | int | None = None,
        eos: bool = False,
        error: ErrorInfo | None = None,
    ) -> TextDelta:
        self.finished = True
        released, parts = self._release(everything=True)
        return TextDelta(
            choice=self._request.choice,
            parts=parts,
            tokens=released,
            finish_reason=reason,
            stop_reason=stop_reason,
            eos=eos,
            error=error,
            prompt=prompt,
            totals=self._totals(),
        )

    def _totals(self) -> ChoiceTotals:
        times = self._times
        if times is not None:
            now = max(times.total_s, self._clock() - self._request.arrival)
            times = msgspec.structs.replace(times, total_s=now)
        return ChoiceTotals(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._count,
            cached_tokens=self._cached,
            reasoning_tokens=self._reasoning_tokens,
            seed=None if self._params.greedy else self._request.params.seed,
            mean_logprob=self._logprob_sum / self._logprob_count if self._logprob_count else None,
            times=times,
        )

    def _cut(self, match: StopMatch) -> None:
        """End the held text where the stop string ends (``include_stop``) or begins; later pieces are not shown."""
        limit = self._unmatched + (match.end if self._params.include_stop else match.start)
        end = self._held_start
        for index, (piece, full) in enumerate(zip(self._held, self._fulls, strict=True)):
            begin, end = end, end + len(full)
            self._fulls[index] = full[: max(0, limit - begin)]
            # Of a character that is cut off, the tokens before its last one have no text, and are cut off with it.
            if not piece.shown or (end <= limit and (piece.text or begin < limit)):
                continue
            if begin < limit:
                # Counted from its end: where special tokens are left out, a piece may lack its leading space.
                keep = max(0, len(piece.text) - (end - limit))
                text, rest = piece.text[:keep], piece.text[keep:]
                raw = None if piece.raw is None else piece.raw[: len(piece.raw) - len(rest.encode())]
                self._held[index] = msgspec.structs.replace(piece, text=text, raw=raw)
            else:
                self._held[index] = msgspec.structs.replace(piece, shown=False)
        self._unfinished = 0


def _parts(pieces: Sequence[TokenPiece]) -> list[Part]:
    text = "".join([piece.text for piece in pieces if piece.shown])
    return [Text(text)] if text else []


def merged_parts(parts: Iterable[Part]) -> list[Part]:
    """``parts``, those that continue the one before joined with it."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + part.text)
        else:
            found.append(part)
    return found


def items_of(parts: Iterable[Part]) -> list[Item]:
    """Merged parts as items: the parts of each tool call joined, at the place of its first."""
    items: list[Item] = []
    calls: dict[int, int] = {}  # of each call, where it is in ``items``
    for part in parts:
        if not isinstance(part, ToolCallPart):
            items.append(part)
        elif part.index not in calls:
            calls[part.index] = len(items)
            items.append(ToolCall(part.id, part.name, part.arguments))
        else:
            before = items[calls[part.index]]
            assert isinstance(before, ToolCall)
            items[calls[part.index]] = ToolCall(before.id, before.name, before.arguments + part.arguments)
    return items


def merged(deltas: Sequence[TextDelta], choice: int) -> TextDelta:
    """All deltas of one finished choice as its only one, under the number ``choice``."""
    last = deltas[-1]
    return msgspec.structs.replace(
        last,
        choice=choice,
        parts=merged_parts(part for delta in deltas for part in delta.parts),
        tokens=[piece for delta in deltas for piece in delta.tokens],
        prompt=next((delta.prompt for delta in deltas if delta.prompt is not None), None),
    )


def collect(deltas: Iterable[TextDelta]) -> Completion:
    """Every delta of one request, in order (choices may interleave), as one answer. Each choice must have ended.

    A JSON reply is the fold of the same deltas that a stream shows.
    """
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
                items=items_of(one.parts),
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
        reasoning_tokens=sum(choice.totals.reasoning_tokens for choice in choices),
    )


def choice_error(delta: TextDelta) -> TruffulaError | None:
    """The error that ended a choice; None while it is generated and after any other end."""
    return TruffulaError.from_info(delta.error) if delta.finish_reason == "error" else None


def rank(delta: TextDelta) -> float:
    """Sort key of ``best_of``: the highest mean logprob first."""
    mean = delta.totals.mean_logprob if delta.totals is not None else None
    return math.inf if mean is None or math.isnan(mean) else -mean

"""What ``LLM`` returns: the fold of a request's deltas, in the types of the offline API."""

from __future__ import annotations

from dataclasses import dataclass, field

from truffula.items import Reasoning, ToolCall
from truffula.params import SamplingParams
from truffula.types import Completion, CompletionChoice, FinishReason, GenerateRequest, TokenPiece

Logprobs = dict[int, float]


@dataclass(frozen=True)
class ChoiceOutput:
    """One completion. ``token_ids`` holds EOS (or the stop id, or the tokens of a stop string) where one ended it.

    ``logprobs``: per generated token, the k most likely ids and the chosen one with their logprobs; None when not asked
    for. ``stop_reason`` is the stop string or stop id that ended it; ``eos`` says that the model's own end did. Of a
    chat, ``text`` is what the model answered beside ``reasoning`` and ``tool_calls``.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    eos: bool
    seed: int | None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(frozen=True)
class RequestOutput:
    """The answer to one prompt. What ``choices`` have too is of choice 0.

    ``prompt`` is the text as the model saw it (a chat rendered; None for ids of a model without tokenizer),
    ``prompt_logprobs`` one dict per prompt token, the first None. ``cached_tokens`` of the prompt came from the prefix
    cache.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    choices: list[ChoiceOutput]
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> list[ToolCall]:
        return self.choices[0].tool_calls

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[Logprobs] | None:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.choices[0].stop_reason


def request_output(request: GenerateRequest, answer: Completion) -> RequestOutput:
    prompt = answer.prompt
    pieces = prompt.tokens if prompt is not None else []
    scored = request.params.prompt_logprobs is not None
    return RequestOutput(
        prompt=None if prompt is None else prompt.text,
        prompt_token_ids=[piece.id for piece in pieces],
        prompt_logprobs=[None if piece.logprob is None else _logprobs(piece) for piece in pieces] if scored else None,
        choices=[_choice(choice, request.params) for choice in answer.choices],
        cached_tokens=answer.cached_tokens,
    )


def _choice(choice: CompletionChoice, params: SamplingParams) -> ChoiceOutput:
    return ChoiceOutput(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        logprobs=[_logprobs(piece) for piece in choice.tokens] if params.logprobs is not None else None,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        eos=choice.eos,
        seed=choice.totals.seed,
        reasoning="".join(item.text for item in choice.items if isinstance(item, Reasoning)),
        tool_calls=[item for item in choice.items if isinstance(item, ToolCall)],
    )


def _logprobs(piece: TokenPiece) -> Logprobs:
    found = {top.id: top.logprob for top in piece.top}
    if piece.logprob is not None:
        found.setdefault(piece.id, piece.logprob)
    return found

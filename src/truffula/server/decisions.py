"""OpenAI's ``/v1/decisions``: probabilities of the answers to questions about one input.

The model reads the input, then a question with lettered options. The probabilities are those of the next token, among
the letters: one token a question, and all questions share the input's KV cache. They are the same alone and in any
batch, as every logprob of this server is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from truffula.errors import InvalidRequest
from truffula.server.decisions_bodies import LETTERS, DecisionsBody, Question
from truffula.server.generating import whole
from truffula.server.prepare import read_requests
from truffula.server.replies import json_reply
from truffula.server.responses_events import usage_of
from truffula.server.state import state_of
from truffula.service.prompts import need_tokenizer
from truffula.types import ChoiceTotals, Completion, GenerateRequest

FAVOUR = 100.0
"""Added to the logits of the letters, so that the reported logprobs are theirs."""


async def decide(request: Request) -> Response:
    """Answers questions about one input with probabilities: predicates, choices and scores."""
    read = await read_requests(request, "decisions")
    body = read.body
    assert isinstance(body, DecisionsBody)
    core = state_of(request).service.core
    tokenizer = need_tokenizer(core.tokenizer, core.info)  # in an adapter's the letters are the same tokens
    options = [question.options(f"questions[{i}]") for i, question in enumerate(body.questions)]
    ids = _letter_ids(tokenizer.encode, max(map(len, options)))
    asked = [_among(one, ids[: len(found)]) for one, found in zip(read.requests, options, strict=True)]

    def reply(found: list[Completion]) -> Response:
        answers = [
            _answer(question, values, _probabilities(one, ids[: len(values)]))
            for question, values, one in zip(body.questions, options, found, strict=True)
        ]
        totals = ChoiceTotals(
            prompt_tokens=sum(one.prompt_tokens for one in found),
            completion_tokens=sum(one.completion_tokens for one in found),
            cached_tokens=sum(one.cached_tokens for one in found),
        )
        model = body.model or state_of(request).model_id
        return json_reply({"answers": answers, "model": model, "usage": usage_of(totals)})

    return await whole(request, asked, reply)


def _letter_ids(encode: Any, count: int) -> list[int]:
    """The tokens of the first ``count`` letters. Raises ``InvalidRequest`` where they are not one token each."""
    ids: list[int] = []
    for letter in LETTERS[:count]:
        found = encode(letter, add_special_tokens=False)
        if len(found) != 1 or found[0] in ids:
            raise InvalidRequest(
                f"This model's tokenizer has no token for {letter!r}, so a question can have at most {len(ids)} "
                "options.",
                param="questions",
            )
        ids.append(found[0])
    return ids


def _among(request: GenerateRequest, ids: Sequence[int]) -> GenerateRequest:
    """``request``, whose next token is one of ``ids``."""
    params = replace(request.params, logit_bias=dict.fromkeys(ids, FAVOUR), logprobs=len(ids))
    return replace(request, params=params)


def _probabilities(found: Completion, ids: Sequence[int]) -> list[float]:
    """The probability of each of ``ids``, in their order; they add up to 1."""
    (token,) = found.choices[0].tokens
    scores = {top.id: top.logprob for top in token.top} | {token.id: token.logprob or 0.0}
    weights = [math.exp(scores[one]) if one in scores else 0.0 for one in ids]
    return [weight / sum(weights) for weight in weights]


def _answer(
    question: Question, options: Sequence[tuple[str | bool, str | None]], probabilities: Sequence[float]
) -> Mapping[str, Any]:
    values = [value for value, _ in options]
    best = max(range(len(values)), key=probabilities.__getitem__)
    shared = {"type": question.type, "name": question.name}
    if question.type == "predicate":
        return {**shared, "probability": probabilities[0]}
    if question.type == "choice":
        rows = [{"value": value, "probability": p} for value, p in zip(values, probabilities, strict=True)]
        return {**shared, "choice": values[best], "confidence": probabilities[best], "probabilities": rows}
    levels = [
        {"label": label, "value": i, "probability": p}
        for i, (label, p) in enumerate(zip(values, probabilities, strict=True), 1)
    ]
    score = sum(i * p for i, p in enumerate(probabilities, 1))
    return {**shared, "score": score, "confidence": probabilities[best], "probabilities": levels}

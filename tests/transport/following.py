"""Following requests on an ``EngineClient`` to their ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truffula.config import EngineConfig
from truffula.engine.client import EngineClient
from truffula.items import Grammar
from truffula.params import EngineParams
from truffula.types import AdapterRef, EngineRequest, TokenEvent, Vocabulary

PATIENCE_S = 90.0
DIGITS = Grammar(key="digits", source="start: /[0-9]{4}/")
VOCABULARY = Vocabulary(
    tokens=[b"<pad>", b"<s>", b"</s>"] + [bytes([char]) for char in range(32, 127)], special_ids=[0, 1, 2], end_ids=[2]
)
"""Of the tiny model, whose 100 ids need not have these bytes."""


def tiny_engine(model: Path, **more: Any) -> EngineConfig:
    settings = {"threads": 1, "memory_bytes": 2**28, "max_running": 8, "step_tokens": 64, "offline": True}
    return EngineConfig(model=str(model), **{**settings, **more})


def ask(
    request_id: str,
    prompt: Sequence[int],
    adapter: AdapterRef | None = None,
    grammar: Grammar | None = None,
    **params: Any,
) -> EngineRequest:
    wanted = EngineParams(**{"temperature": 0, "max_tokens": 6, "seed": 7, **params})
    return EngineRequest(
        request_id=request_id, prompt_ids=list(prompt), params=wanted, adapter=adapter, grammar=grammar,
        arrival=time.monotonic(),
    )  # fmt: skip


@dataclass
class Answer:
    """All events of one request, folded; ``events`` as they came."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: Any = None
    finish: str | None = None
    stop_reason: int | None = None
    code: str | None = None
    message: str = ""


def fold(answers: dict[str, Answer], events: Sequence[TokenEvent]) -> None:
    for event in events:
        answer = answers.setdefault(event.request_id, Answer())
        assert answer.finish is None, f"{event.request_id} got an event behind its final one"
        answer.token_ids += event.token_ids
        answer.logprobs += event.logprobs
        answer.prompt_logprobs = event.prompt_logprobs or answer.prompt_logprobs
        answer.finish, answer.stop_reason = event.finish_reason, event.stop_reason
        if event.error is not None:
            answer.code, answer.message = event.error.code, event.error.message


def follow(client: EngineClient, ids: Sequence[str], answers: dict[str, Answer] | None = None) -> dict[str, Answer]:
    """The answers of ``ids`` once each has its final event."""
    answers = {} if answers is None else answers
    deadline = time.monotonic() + PATIENCE_S
    while any(i not in answers or answers[i].finish is None for i in ids):
        assert time.monotonic() < deadline, f"no end of {[i for i in ids if i not in answers or not answers[i].finish]}"
        fold(answers, client.events(0.5))
    return answers


def run(client: EngineClient, requests: Sequence[EngineRequest]) -> dict[str, Answer]:
    client.submit(requests)
    return follow(client, [request.request_id for request in requests])


def text_of(answer: Answer) -> str:
    """The text of the tiny model's ids by ``VOCABULARY``."""
    return b"".join(VOCABULARY.tokens[i] for i in answer.token_ids).decode()


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``; it is polled, because what it watches is another process."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)
    return value

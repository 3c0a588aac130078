"""``AsyncService``: the service under an event loop. The servers' only door to the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from truffula.service.core import ServiceLimits
from truffula.types import (
    AdapterCommand,
    AdapterRef,
    AdapterState,
    Completion,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    TextDelta,
)


class TextStream:
    """One running request: ``async for deltas in stream``; each item is a non-empty list, choices may interleave.

    An error that strikes before the first delta is raised from the first ``__anext__`` (so a server can still answer
    with a status); a later one is a terminal delta with ``error``. ``aclose`` (or leaving ``async with``) aborts what
    still runs, within a step.
    """

    request_id: str
    prompt_tokens: int
    seed: int | None

    def __aiter__(self) -> AsyncIterator[list[TextDelta]]:
        raise NotImplementedError

    async def __anext__(self) -> list[TextDelta]:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> TextStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class AsyncService:
    """Made in ``create_app``'s lifespan by ``await service.start()`` on the running loop, ended by ``await
    service.close()``.
    """

    limits: ServiceLimits

    async def start(self) -> None:
        """Take the running loop and start the dispatcher thread."""

    @property
    def info(self) -> EngineInfo:
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """``truffula.text.tokenizer.Tokenizer``, or None of a model without one."""
        raise NotImplementedError

    @property
    def has_chat_template(self) -> bool:
        raise NotImplementedError

    def resolve_adapter(self, name: str | None, source: str | None = None) -> AdapterRef | None:
        """Who answers: None is the base (None, "" and ``limits.base_names``). Raises ``AdapterNotFound``."""
        raise NotImplementedError

    def adapter_names(self) -> list[str]:
        """Names a client may use now, sorted."""
        raise NotImplementedError

    async def open(self, request: GenerateRequest) -> TextStream:
        """Template, tokenise, check, submit. Raises ``InvalidRequest``, ``NoTokenizer``, ``ShuttingDown``,
        ``EngineDied``, …
        """
        raise NotImplementedError

    def stream(self, request: GenerateRequest) -> AsyncIterator[list[TextDelta]]:
        """``open`` as an async generator; close it (``contextlib.aclosing``) to abort."""
        raise NotImplementedError

    async def complete(self, request: GenerateRequest) -> Completion:
        """The whole answer. An error of any choice is raised. Cancelling the task aborts in the engine."""
        raise NotImplementedError

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[tuple[int, str, int, int]]:
        """``(id, vocabulary piece, start, stop)`` per token; character offsets, 0, 0 for tokens the tokenizer added."""
        raise NotImplementedError

    async def render(self, request: GenerateRequest) -> tuple[str, list[int]]:
        """A chat or prompt as the model would see it: ``(text, prompt ids)``; nothing is submitted."""
        raise NotImplementedError

    async def detokenize(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        raise NotImplementedError

    async def adapters(self, command: AdapterCommand, timeout: float = 300.0) -> list[AdapterState]:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def healthy(self) -> bool:
        """Started, not draining, and the engine's heartbeat fresh."""
        raise NotImplementedError

    @property
    def draining(self) -> bool:
        raise NotImplementedError

    @property
    def active(self) -> int:
        """Requests that are running or waiting now."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests (``ShuttingDown``), wait for the running ones; True when all ended in time. The rest is
        aborted.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Abort what runs, stop the dispatcher, close the client."""
        raise NotImplementedError

"""``Shadows``: copies of requests to another adapter, whose answers are discarded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from msgspec.structs import replace

from truffula.errors import TruffulaError
from truffula.metrics import Metrics
from truffula.service.aio import AsyncService
from truffula.types import AdapterRef, GenerateRequest

MOST = 8
"""Shadows at a time."""
QUEUE_S = 5.0
log = logging.getLogger(__name__)


class Shadows:
    """Begins a shadow after its request was accepted, and forgets it: whatever happens to it, the request is not
    touched.

    A shadow is dropped while ``MOST`` others run, half of the engine's places are taken or a request waits. In the
    engine it has no weight: it takes what others leave, preempts none, and is preempted first.
    """

    def __init__(self, service: AsyncService, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, adapter: AdapterRef, requests: Sequence[GenerateRequest]) -> None:
        """Send copies of ``requests`` to ``adapter``, or drop them."""
        stats = self._service.known_stats()
        most = self._service.info.max_running // 2
        if len(self._tasks) >= MOST or stats is None or stats.waiting or stats.running + len(requests) > most:
            self._metrics.shadow_ended("dropped")
            return
        more = {"adapter": adapter, "tenant": "shadow", "weight": 0.0, "queue_timeout_s": QUEUE_S}
        copies = [replace(one, request_id=f"{one.request_id}-shadow", **more) for one in requests]
        task = asyncio.create_task(self._run(adapter, copies))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, adapter: AdapterRef, requests: Sequence[GenerateRequest]) -> None:
        name, tokens, outcome = adapter.name, 0, "cancelled"
        try:
            async with contextlib.AsyncExitStack() as streams:
                for stream in await self._service.open_all(requests):
                    await streams.enter_async_context(stream)
                    async for deltas in stream:
                        tokens += sum(len(delta.tokens) for delta in deltas)
                        outcome = next((one.finish_reason for one in deltas if one.finish_reason), outcome)
        except TruffulaError as error:
            outcome = error.code
        except Exception:
            log.exception("the shadow %s failed with an internal error", requests[0].request_id)
            outcome = "internal_error"
        finally:
            self._metrics.shadow_ended(outcome)
            log.info(
                "shadow id=%s adapter=%s completion_tokens=%d finish=%s", requests[0].request_id, name, tokens, outcome
            )

    def close(self) -> None:
        """End those that run."""
        for task in self._tasks:
            task.cancel()

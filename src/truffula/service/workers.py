"""``TextWorkers``: the server's text workers, and which client's call runs next."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from msgspec.structs import replace

from truffula.errors import Overloaded, TemplateError
from truffula.service.prompts import render_job, unpack_rendered
from truffula.text.chat_template import ChatTemplates
from truffula.text.process import Job, Setup, TextWorker, WorkerStopped
from truffula.types import GenerateRequest

MAX_WAITING_PER_CLIENT = 1024
"""As many as sequences wait in the engine's queue. The server's open requests bound those of all clients."""
HEAVY_NICENESS = 5
HEAVY_IDLE_S = 60.0
"""A heavy worker ends after this time without a call: what large texts took returns to the system."""
TEMPLATE_SECONDS = 2.0
"""Processor time of one rendering of a chat template."""
log = logging.getLogger(__name__)


class TextWorkers:
    """Two pools whose calls never wait for each other's.

    Args:
        setup: Of each worker.
        heavy: Number of workers for heavy calls; None: one per four processors.

    ``light`` is for short chats whose template is not plain, ``heavy`` for large bodies and long texts.
    """

    def __init__(self, setup: Setup, *, heavy: int | None = None) -> None:
        count = heavy or max(1, (os.cpu_count() or 1) // 4)
        nicer = replace(setup, niceness=HEAVY_NICENESS)
        self.light = WorkerPool([TextWorker(setup)])
        self.heavy = WorkerPool([TextWorker(nicer) for _ in range(count)], HEAVY_IDLE_S)

    def render_at_start(self, templates: ChatTemplates, request: GenerateRequest) -> str:
        """As ``templates.render``, in the caller's thread, before the event loop uses the workers."""
        if templates.is_plain(templates.choose(request)):
            return templates.render(request)
        try:
            (packed,) = self.light.workers[0].call(render_job, request, TEMPLATE_SECONDS)
        except WorkerStopped as error:
            log.warning("%s", template_stopped(error).message)
            raise template_stopped(error) from error
        return unpack_rendered(packed)[0]

    def close(self) -> None:
        """End the workers; calls that run end with ``ShuttingDown``. Idempotent."""
        self.light.close()
        self.heavy.close()


def template_stopped(error: WorkerStopped) -> TemplateError:
    """The error of a template that has exceeded a limit."""
    return TemplateError(f"The chat template was stopped: {error.message}.", param="messages")


class WorkerPool:
    """Workers and the calls that wait for them. Owned by the event loop's thread; ``close`` is for any.

    Clients take turns: calls that are many or long delay those of the same client. The number of calls that one client
    has waiting is bounded, and further ones are refused.

    Args:
        idle_s: A worker's process ends after this time without a call; None: it stays.
    """

    def __init__(self, workers: Sequence[TextWorker], idle_s: float | None = None) -> None:
        self.workers = tuple(workers)
        self._free = list(self.workers)
        self._idle_s = idle_s
        self._timers: dict[TextWorker, asyncio.TimerHandle] = {}
        self._waiting: OrderedDict[str, deque[asyncio.Future[TextWorker]]] = OrderedDict()  # the next client first
        self._threads = ThreadPoolExecutor(len(self.workers), thread_name_prefix="truffula-text-worker")

    async def run(self, job: Job, argument: Any, *, client: str, seconds: float) -> list[bytes]:
        """What ``job`` yields in a worker, as ``TextWorker.call``; also raises ``Overloaded``."""
        loop = asyncio.get_running_loop()
        worker = await self.acquire(client)
        running = loop.run_in_executor(self._threads, worker.call, job, argument, seconds)

        def ended(call: asyncio.Future[list[bytes]]) -> None:
            call.exception()  # of a call whose client has left, too
            self.release(worker)

        # The worker is free when the call has ended, not when its client has left.
        running.add_done_callback(ended)
        return await asyncio.shield(running)

    async def acquire(self, client: str) -> TextWorker:
        """The next free worker, when it is the client's turn. Raises ``Overloaded``."""
        if self._free:
            worker = self._free.pop()  # the one used last: others may end
            if (timer := self._timers.pop(worker, None)) is not None:
                timer.cancel()
            return worker
        own = self._waiting.get(client, deque())
        if len(own) >= MAX_WAITING_PER_CLIENT:
            raise Overloaded(
                f"{len(own)} requests of this client wait to be read, because they are long or because of the model's "
                f"chat template; the limit is {MAX_WAITING_PER_CLIENT}.",
                retry_after_s=2,
            )
        turn: asyncio.Future[TextWorker] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(turn.result())
            elif turn in (own := self._waiting.get(client, deque())):
                own.remove(turn)
                if not own:
                    del self._waiting[client]
            raise

    def release(self, worker: TextWorker) -> None:
        """Give ``worker`` to the client whose turn it is."""
        while self._waiting:
            client, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # behind the other clients
            if not turn.done():
                turn.set_result(worker)
                return
        self._free.append(worker)
        if self._idle_s is not None and worker.pid is not None:
            self._timers[worker] = asyncio.get_running_loop().call_later(self._idle_s, self._end_idle, worker)

    def close(self) -> None:
        """End the workers. Idempotent."""
        for timer in self._timers.values():
            timer.cancel()
        for worker in self.workers:
            worker.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _end_idle(self, worker: TextWorker) -> None:
        del self._timers[worker]
        self._free.remove(worker)
        closing = asyncio.get_running_loop().run_in_executor(None, worker.close)
        closing.add_done_callback(lambda _: self.release(worker))
